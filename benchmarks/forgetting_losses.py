"""Losses of the frontier that the trainer does not have: some tokens count less.

All logits of a batch exist at a time here, so what these take in memory says little of
the methods. Each returns what `next_token_loss` does, and a step is divided by how many
tokens count, whatever their weights: Adam takes no notice of such a factor.
"""

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.llama.checkpoints.loading import load_model
from examples.llama.model.llama import Llama
from examples.llama.model.loss import Batch, pick, predict
from examples.llama.model.products import float32_einsum
from examples.llama.text.batches import ordered_batches
from examples.llama.text.rows import load_dataset
from examples.llama.text.tokenizer import load_tokenizer
from examples.llama.training.config import Config
from examples.llama.training.steps import Loss

CANDIDATES = 20  # of EAFT, the K of its paper
MEDIAN_OF = 1000  # records, of FLOW
AT_ONCE = 8


def eaft(config: Config) -> Loss:
    """EAFT (arXiv 2601.02151): a token counts by the entropy of the prediction.

    The weight is the entropy of the 20 likeliest tokens over its largest value, of the
    model as it is, and no gradient goes through it. So what the model is sure of and
    the data contradict moves little. We could not verify whether the paper makes the
    probabilities of the 20 add up to one, as is done here.
    """
    del config

    def loss(model: Llama, batch: Batch, *, packed: bool, pretrained: Any) -> Any:
        del pretrained
        logits, targets, mask = predictions(model, batch, packed)
        likeliest, _ = jax.lax.top_k(logits, CANDIDATES)
        logs = jax.nn.log_softmax(likeliest)
        entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
        weights = jax.lax.stop_gradient(entropy / math.log(CANDIDATES))
        return _total(weights * _losses(logits, targets), mask)

    return loss


def flow(config: Config) -> Loss:
    """FLOW (arXiv 2502.02797): a record counts by the pretrained model's loss on it.

    The weight is exp(-loss / median): what is hard for the pretrained model counts
    little. The loss is the mean over the record's counted tokens, the median that of
    the first records. Both are our choice: we could read only the abstract and
    summaries. Weights are computed anew at each step, where an implementation for use
    would keep them, so its time here is more than it needs; that of the median is left
    out.
    """
    median = _median_loss(
        config.model,
        config.tokenizer or config.model,
        config.sources[0].path,
        config.max_length,
        config.template,
    )

    def loss(model: Llama, batch: Batch, *, packed: bool, pretrained: Any) -> Any:
        logits, targets, mask = predictions(model, batch, packed)
        own = jax.lax.stop_gradient(_row_losses(pretrained, batch, packed))
        weights = jnp.exp(-own / median)[:, None]
        return _total(weights * _losses(logits, targets), mask)

    return loss


@functools.cache
def _median_loss(
    model: Path, tokenizer: Path, data: str, max_length: int, template: str
) -> float:
    """Median of the mean losses of the first records, by the model before training."""
    graph, params = nnx.split(load_model(model))
    dataset = load_dataset(
        data, load_tokenizer(tokenizer), max_length, template=template
    )

    @jax.jit
    def of_batch(params: nnx.State, batch: Batch) -> jax.Array:
        return _row_losses(nnx.merge(graph, params), batch, packed=False)

    found = []
    with jax.numpy_dtype_promotion("standard"):  # as in compile_step
        batches = ordered_batches(dataset, AT_ONCE)
        for batch in itertools.islice(batches, math.ceil(MEDIAN_OF / AT_ONCE)):
            counted = batch["loss_mask"][:, 1:].any(axis=1)  # the last one is filled up
            found.append(np.asarray(of_batch(params, batch))[counted])
    return float(np.median(np.concatenate(found)[:MEDIAN_OF]))


def _row_losses(model: Llama, batch: Batch, packed: bool) -> jax.Array:
    """Mean loss of the counted tokens of each row, [B]."""
    logits, targets, mask = predictions(model, batch, packed)
    sums = jnp.sum(_losses(logits, targets), axis=1, where=mask)
    return sums / jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32), 1)


def predictions(
    model: Llama, batch: Batch, packed: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits [B, L, V], the tokens that come next [B, L], and which count."""
    hidden, targets, mask = predict(model, batch, packed)
    head = model.head().astype(hidden.dtype)
    return float32_einsum("bld,dv->blv", hidden, head), targets, mask


def _losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1) - pick(logits, targets)


def _total(losses: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(losses, where=mask), jnp.sum(mask, dtype=jnp.float32)
