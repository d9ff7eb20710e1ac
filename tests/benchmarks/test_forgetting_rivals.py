"""Losses and optimizers that only the frontier has, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks import forgetting_losses
from benchmarks.forgetting_losses import eaft, flow
from benchmarks.forgetting_optimizers import finch, partially_adaptive
from examples.llama.checkpoints.loading import load_model
from examples.llama.text.batches import ordered_batches
from examples.llama.text.rows import load_dataset
from examples.llama.text.tokenizer import load_tokenizer
from tests.examples.llama.runs import config_of, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def dataset(files):
    return load_dataset(files["data"][0], load_tokenizer(files["model"]), 48)


@pytest.fixture(scope="module")
def model(files):
    return load_model(files["model"])


def by_hand(model, batch):
    """Log probabilities [B, L - 1, V] in float64, losses, and which of them count."""
    logits = np.asarray(model(jnp.asarray(batch["tokens"])), np.float64)[:, :-1]
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = -np.take_along_axis(logs, batch["tokens"][:, 1:, None], axis=2)[..., 0]
    return logs, losses, batch["loss_mask"][:, 1:]


def value(loss, model, batch, pretrained):
    graph, params = nnx.split(model)

    @jax.jit
    def of(params, other):
        with jax.numpy_dtype_promotion("standard"):
            models = nnx.merge(graph, params), nnx.merge(graph, other)
            return loss(models[0], batch, packed=False, pretrained=models[1])

    return map(float, of(params, nnx.state(pretrained)))


def test_eaft(files, dataset, model, tmp_path):
    batch = next(iter(ordered_batches(dataset, 4)))
    logs, losses, mask = by_hand(model, batch)
    top = np.sort(np.exp(logs), axis=-1)[..., -20:]
    top /= top.sum(axis=-1, keepdims=True)
    weights = -(top * np.log(top)).sum(axis=-1) / np.log(20)
    assert weights.min() > 0 and weights.max() <= 1
    loss = eaft(config_of(files, tmp_path))
    total, count = value(loss, model, batch, model)
    assert total == pytest.approx((weights * losses)[mask].sum(), rel=1e-4)
    assert count == mask.sum()


def test_flow(files, dataset, model, tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting_losses, "MEDIAN_OF", 10)
    forgetting_losses._median_loss.cache_clear()
    means = []
    for batch in ordered_batches(dataset, 1):
        _, losses, mask = by_hand(model, batch)
        means.append(losses[mask].mean())
    median = np.median(means[:10])
    changed = nnx.clone(model)
    nnx.update(changed, jax.tree.map(lambda x: 1.1 * x, nnx.state(model)))
    batch = next(iter(ordered_batches(dataset, 4)))
    _, losses, mask = by_hand(changed, batch)
    expected = sum(
        np.exp(-mean / median) * row[counted].sum()
        for mean, row, counted in zip(means, losses, mask, strict=False)
    )
    loss = flow(config_of(files, tmp_path))
    total, count = value(loss, changed, batch, model)
    assert total == pytest.approx(expected, rel=1e-4) and count == mask.sum()


def steps(optimizer, gradients, **extra):
    """The updates of the last of the gradients."""
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state = optimizer.init(params)
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params, **extra)
    return updates


def test_partially_adaptive(files, tmp_path):
    """Gradients that stay the same: their root, and together of size 1."""
    gradients = {"a": jnp.array([1.0, 4.0, -9.0]), "b": jnp.array([0.25])}
    optimizer = partially_adaptive(config_of(files, tmp_path))
    updates = steps(optimizer, 3 * [gradients], learning_rate=jnp.float32(0.5))
    roots = np.array([1, 2, -3, 0.5])
    expected = -0.5 * roots / np.sqrt((roots**2).mean())
    found = np.concatenate([updates["a"], updates["b"]])
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_finch(files, tmp_path):
    config = config_of(files, tmp_path, method="adamw")
    gradients = [{"a": jnp.array([1.0, -2.0])}]
    for loss in (4.0, 0.25):
        extra = {"learning_rate": jnp.float32(0.5), "value": jnp.float32(loss)}
        updates = steps(finch(config), gradients, **extra)
        expected = 0.5 / loss**0.5 * np.array([-1, 1])
        np.testing.assert_allclose(updates["a"], expected, rtol=1e-5)
    assert isinstance(finch(config), optax.GradientTransformationExtraArgs)
