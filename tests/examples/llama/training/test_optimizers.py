"""Schedules and methods, by the updates that they give."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama.training.optimizers import learning_rates, make_optimizer
from mofo_jax.continual import FactoredFisher
from tests.examples.llama.runs import config_of

FILES = {"model": None, "data": ()}


def make(**changes):
    config = config_of(FILES, None, **{"steps": 12} | changes)
    optimizer = make_optimizer(config)

    @jax.jit
    def update(gradients, state, params, **extra):
        extra |= {"learning_rate": jnp.float32(config.learning_rate)}
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradients, state, params, **extra)

    return update, optimizer.init


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule(schedule, warmup):
    config = config_of(FILES, None, schedule=schedule, warmup_steps=warmup)
    rates = learning_rates(config, 12)
    assert rates.shape == (12,) and rates.dtype == np.float32
    for step, rate in enumerate(rates):
        along = (step - warmup) / (12 - warmup)
        after = {
            "cosine": 0.5 + 0.5 * math.cos(math.pi * along),
            "linear": 1 - along,
            "constant": 1.0,
        }[schedule]
        expected = 1e-2 * (step / warmup if step < warmup else after)
        assert float(rate) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_warmup_as_long_as_the_run():
    with pytest.raises(ValueError, match="warmup_steps must be below 12 steps, got 12"):
        learning_rates(config_of(FILES, None, warmup_steps=12), 12)


@pytest.mark.parametrize("method", ["adamw", "mofo", "lion", "mofo-lion"])
def test_methods(method):
    """Gradients that stay the same make either's update minus the learning rate."""
    update, init = make(method=method, alpha=0.25)
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
    update, init = make(method=method, weight_decay=0.5)
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


def test_gain():
    """Momentum says down for entry 0, the gradient says up: it stays, though large."""
    update, init = make(method="gain", alpha=0.25)
    params = {"proj": jnp.ones(8), "norm": jnp.ones(8)}
    first = {"proj": jnp.array([9.0, 8, 1, 1, 1, 1, 1, 1]), "norm": jnp.ones(8)}
    second = {"proj": jnp.array([-3.0, 2, 1, 1, 1, 1, 1, 5]), "norm": jnp.ones(8)}
    _, state = update(first, init(params), params)
    updates, _ = update(second, state, params)
    assert np.flatnonzero(updates["proj"]).tolist() == [1, 7]
    assert (updates["proj"][np.array([1, 7])] < 0).all()


@pytest.mark.parametrize("method", ["gradient", "mv", "random"])
def test_other_selections(method):
    """The same Adam, for a quarter of the entries, norms whole."""
    update, init = make(method=method, alpha=0.25)
    params = {"proj": jnp.ones(8), "norm": jnp.ones(8)}
    first = {"proj": jnp.array([9.0, 8, 1, 1, 1, 1, 1, 1]), "norm": jnp.ones(8)}
    second = {"proj": jnp.array([1.0, 1, 1, 1, 1, 1, 7, 6]), "norm": jnp.ones(8)}
    updates, state = update(first, init(params), params)
    updates, _ = update(second, state, params)
    assert (updates["norm"] != 0).all()
    moved = np.flatnonzero(updates["proj"]).tolist()
    assert len(moved) == 2
    if method == "gradient":
        assert moved == [6, 7]
    if method == "mv":  # the largest steps, not the largest momentum of entries 0, 1
        adam = optax.adam(1e-2)
        with jax.numpy_dtype_promotion("standard"):
            _, state = adam.update(first, adam.init(params), params)
            whole, _ = adam.update(second, state, params)
        sizes = np.abs(whole["proj"])
        assert sizes[moved].min() >= np.sort(sizes)[-2]
        np.testing.assert_allclose(
            updates["proj"][np.array(moved)], whole["proj"][np.array(moved)], rtol=1e-4
        )


def test_random_selection_changes():
    update, init = make(method="random", alpha=0.1)
    params = {"proj": jnp.ones(100)}
    state, seen = init(params), set()
    for _ in range(4):
        updates, state = update(params, state, params)
        seen.add(tuple(np.flatnonzero(updates["proj"]).tolist()))
    assert len(seen) == 4 and all(len(moved) == 10 for moved in seen)


def test_hft():
    """Two of four projections rest, whatever decays or pulls at them."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    params = {"layers": [{"self_attn": {name: jnp.ones(3) for name in names}}]}
    changes = {"weight_decay": 0.5, "regularize": ("l2:1", "l1-decoupled:1")}
    update, init = make(method="hft", **changes)
    reference = jax.tree.map(jnp.zeros_like, params)
    updates, _ = update(params, init(params), params, reference=reference)
    moved = [bool((u != 0).all()) for u in jax.tree.leaves(updates)]
    assert sum(moved) == 2
    rest = [bool((u == 0).all()) for u in jax.tree.leaves(updates)]
    assert sum(rest) == 2


@pytest.mark.parametrize("method", ["adamw", "mofo", "mofo-lion"])
def test_penalties(method):
    """In the loss they come before the moments; decoupled, after them."""
    params = {"proj": jnp.array([1.0, 3.0]), "norm": jnp.array([2.0])}
    reference = {"proj": jnp.array([1.0, 1.0]), "norm": jnp.array([1.0])}
    zeros = jax.tree.map(jnp.zeros_like, params)
    coupled = ("l1:1", "l2:0.5", "ewc:2")
    changes = {"method": method, "alpha": 0.5}
    update, init = make(**changes, regularize=coupled)
    fisher = {"proj": jnp.array([9.0, 3.0]), "norm": jnp.array([0.0])}
    _, state = update(zeros, init(params), params, reference=reference, fisher=fisher)
    # Distances 2 and 1: 1 + 2 * 0.5 * 2 + 2 * 3 * 2 = 15 and 1 + 2 * 0.5 = 2.
    share = 0.01 if method == "mofo-lion" else 0.1
    mu = optax.tree.get(state, "mu")
    np.testing.assert_allclose(mu["proj"], [0, 15 * share], rtol=1e-5)
    np.testing.assert_allclose(mu["norm"], [2 * share], rtol=1e-5)
    decoupled = ("l1-decoupled:1", "l2-decoupled:0.5")
    update, init = make(**changes, regularize=decoupled)
    updates, state = update(zeros, init(params), params, reference=reference)
    assert not np.any(optax.tree.get(state, "mu")["proj"])
    np.testing.assert_allclose(updates["proj"], [0, -1e-2 * 3], rtol=1e-5)
    np.testing.assert_allclose(updates["norm"], [-1e-2 * 2], rtol=1e-5)


IMPORTANCE = {"proj": jnp.array([9.0, 0, 0, 9, 0, 0, 0, 9]), "norm": jnp.ones(8)}


def step_with_importance(**changes):
    """A first step, in which Adam's own would be 1 for every entry."""
    changes = {"importance": "self", "schedule": "constant"} | changes
    update, init = make(**changes)
    params = {"proj": jnp.ones(8), "norm": jnp.ones(8)}
    gradients = {"proj": jnp.arange(8.0, 0, -1), "norm": jnp.ones(8)}
    updates, _ = update(gradients, init(params), params, importance=IMPORTANCE)
    return jax.tree.map(np.asarray, updates)


def test_steps_in_the_metric():
    """0.01 / (F / mean F + 0.01) at first, times the learning rate."""
    relative = {name: np.asarray(x) / (35 / 16) for name, x in IMPORTANCE.items()}
    steps = {name: 0.01 / (x + 0.01) for name, x in relative.items()}
    for method in ("adamw", "lion"):
        updates = step_with_importance(method=method)
        for name, step in steps.items():
            np.testing.assert_allclose(updates[name], -1e-2 * step, rtol=1e-4)


@pytest.mark.parametrize("method", ["gain", "keep", "mv", "mofo", "gradient"])
def test_filters_rank_the_steps_that_are_made(method):
    """Entries 0, 3 and 7 matter, and the gradients fall from the first entry on."""
    importance = {"importance": None} if method == "keep" else {}
    updates = step_with_importance(method=method, alpha=0.25, **importance)
    moved = np.flatnonzero(updates["proj"]).tolist()
    if method == "mv":  # whose steps are alike where nothing matters
        assert len(moved) == 2 and not {0, 3, 7} & set(moved)
    else:
        assert moved == ([0, 1] if method in ("mofo", "gradient") else [1, 2])
    assert (updates["proj"][moved] < 0).all() and (updates["norm"] < 0).all()


@pytest.mark.parametrize("method", ["random", "mofo-lion"])
def test_other_filters_have_the_metric_too(method):
    updates = step_with_importance(method=method, alpha=0.25)
    whole = step_with_importance(method="lion" if "lion" in method else "adamw")
    moved = np.flatnonzero(updates["proj"]).tolist()
    assert len(moved) == 2
    np.testing.assert_allclose(updates["proj"][moved], whole["proj"][moved], rtol=1e-5)


def test_importance_beside_penalties_and_hft():
    """EWC's Fisher information is another one; resting parameters have no step."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    params = {"layers": [{"self_attn": {name: jnp.ones((3, 2)) for name in names}}]}
    changes = {"method": "hft", "regularize": ("ewc:1",), "importance": "self"}
    update, init = make(**changes)
    factors = FactoredFisher(jnp.ones(3), jnp.ones(2))
    updates, _ = update(
        params,
        init(params),
        params,
        reference=params,
        fisher=jax.tree.map(jnp.zeros_like, params),
        importance=jax.tree.map(lambda x: factors, params),
    )
    moved = [bool((u != 0).all()) for u in jax.tree.leaves(updates)]
    assert sum(moved) == 2


def test_importance_must_be_given():
    update, init = make(method="keep")
    params = {"proj": jnp.ones(8)}
    with pytest.raises(ValueError, match="scale_by_fisher needs fisher"):
        update(params, init(params), params)
