"""Schedules and methods, by the updates that they give."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama.optimizers import make_optimizer, make_schedule
from tests.examples.llama.training import config_of

FILES = {"model": None, "data": ()}


def make(**changes):
    config = config_of(FILES, None, **{"steps": 12} | changes)
    optimizer = make_optimizer(config, 12)

    @jax.jit
    def update(gradients, state, params):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradients, state, params)

    return update, optimizer.init


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule(schedule, warmup):
    config = config_of(FILES, None, schedule=schedule, warmup_steps=warmup)
    rate = make_schedule(config, 12)
    for step in range(13):
        along = (step - warmup) / (12 - warmup)
        after = {
            "cosine": 0.5 + 0.5 * math.cos(math.pi * along),
            "linear": 1 - along,
            "constant": 1.0,
        }[schedule]
        expected = 1e-2 * (step / warmup if step < warmup else after)
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_warmup_as_long_as_the_run():
    with pytest.raises(ValueError, match="warmup_steps must be below 12 steps, got 12"):
        make(warmup_steps=12)


@pytest.mark.parametrize("method", ["adamw", "mofo", "lion", "mofo-lion"])
def test_methods(method):
    """Gradients that stay the same make either's update minus the learning rate."""
    update, init = make(method=method, alpha=0.25, schedule="constant")
    params = {"proj": jnp.ones(8), "norm": jnp.ones(8)}
    gradients = jax.tree.map(lambda x: 1 + jnp.arange(8, dtype=x.dtype), params)
    state = init(params)
    for _ in range(3):
        updates, state = update(gradients, state, params)
        expected = np.full(8, -1e-2)
        np.testing.assert_allclose(updates["norm"], expected, rtol=1e-4)
        if method.startswith("mofo"):
            expected[:6] = 0  # a quarter of 8 moves
        np.testing.assert_allclose(updates["proj"], expected, rtol=1e-4)


@pytest.mark.parametrize("method", ["adamw", "mofo", "lion", "mofo-lion"])
def test_weight_decay(method):
    update, init = make(method=method, weight_decay=0.5, schedule="constant")
    params = {"proj": jnp.arange(8.0)}
    zeros = optax.tree.zeros_like(params)
    updates, _ = update(zeros, init(params), params)
    np.testing.assert_allclose(updates["proj"], -1e-2 * 0.5 * np.arange(8.0), rtol=1e-6)


def test_clipping():
    """Adam's second moment shows the clipped gradient; its update would not."""
    _, init = make(method="adamw", clip_norm=0.5)
    update, _ = make(method="adamw", clip_norm=0.5)
    params = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, state = update(params, init(params), params)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["b"], [0.1 * 0.4], rtol=1e-5)


@pytest.mark.parametrize("method", ["adamw", "mofo", "lion", "mofo-lion"])
def test_moments_dtype(method):
    update, init = make(method=method, moments_dtype="bfloat16")
    params = {"proj": jnp.ones(8)}
    state = init(params)
    for _ in range(2):
        assert optax.tree.get(state, "mu")["proj"].dtype == jnp.bfloat16
        updates, state = update(params, state, params)
        assert updates["proj"].dtype == jnp.float32
