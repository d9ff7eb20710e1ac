"""The trainer's compiled step on random tokens, for benchmarks of what it costs."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from examples.llama.model.architectures import ARCHITECTURES, LlamaConfig
from examples.llama.model.llama import Llama
from examples.llama.model.loss import Batch
from examples.llama.model.sharding import replicated
from examples.llama.training.config import Config
from examples.llama.training.optimizers import make_optimizer
from examples.llama.training.steps import (
    Fixed,
    TrainState,
    compile_step,
    init_state,
    make_step,
    peak_bytes,
)

SHAPES = {
    "260K": LlamaConfig(  # of llama2.c's stories260K
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "24M": LlamaConfig(  # of llama2.c's stories15M, which ties its embeddings
        vocab_size=32000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
    ),
    "125M": LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
    ),
    **ARCHITECTURES,
}


class TrainingStep(NamedTuple):
    """A compiled step."""

    run: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState  # before the first step, which takes its memory
    peak_bytes: int  # needed at most, inputs included


def random_model(
    shape: LlamaConfig, mesh: Mesh, **options: Any
) -> tuple[nnx.GraphDef, nnx.State]:
    """A Llama's graph and random parameters; `options` are of `Llama`."""

    def new() -> Llama:
        return Llama(shape, rngs=nnx.Rngs(0), **options)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        # Compiled once for a shape: the model's own initializers, all in one program,
        # take a GPU's compiler more than a minute.
        if len(like.shape) < 2:
            return jnp.ones(like.shape, like.dtype)
        return 0.02 * jax.random.normal(key, like.shape, like.dtype)

    graph, shapes = nnx.split(nnx.eval_shape(new))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = jax.tree.unflatten(tree, map(draw, keys, leaves))
    return graph, jax.device_put(params, replicated(mesh))


def batch_of(tokens: np.ndarray, answer_share: float) -> dict[str, np.ndarray]:
    """Rows [B, L] without padding. The last `answer_share` of each is its answer."""
    length = tokens.shape[1]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens,
        "loss_mask": positions >= prompt_length(length, answer_share),
        "segment_ids": np.ones_like(tokens),
        "positions": positions,
    }


def prompt_length(length: int, answer_share: float) -> int:
    """Tokens of a row that do not count; at least the first, which none predicts."""
    return max(1, round(length * (1 - answer_share)))


def training_step(
    graph: nnx.GraphDef,
    params: nnx.State,
    batch: Batch,
    method: str,
    mesh: Mesh,
    importance: Any = None,
) -> TrainingStep:
    """The step that the trainer runs with `--method`, for batches of this shape.

    `keep` needs an importance: the Fisher information that divides its steps.
    """
    config = Config(
        model=Path(), data=(), output=Path(), method=method, learning_rate=1e-5, steps=9
    )
    optimizer = make_optimizer(config)
    state = init_state(optimizer, params, mesh)
    fixed = Fixed(nnx.State({}), importance=importance)
    step = make_step(graph, optimizer, packed=False)
    compiled = compile_step(step, state, fixed, batch, mesh=mesh)
    rate = np.float32(config.learning_rate)

    def run(state: TrainState, batch: Batch) -> Any:
        return compiled(state, fixed, rate, batch)

    return TrainingStep(run, state, peak_bytes(compiled))
