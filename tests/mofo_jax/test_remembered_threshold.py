"""The threshold that the state remembers speeds the search up and decides nothing."""

from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings

from mofo_jax import filter_by_momentum, scale_by_mofo, top_fraction_mask
from mofo_jax.testing import count_passes


class OldState(NamedTuple):
    """FilterByMomentumState before it remembered thresholds."""

    inner_state: optax.OptState
    step: jax.Array


def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "a": jax.random.normal(keys[0], (64, 128)),
        "b": jax.random.normal(keys[1], (64, 128), jnp.bfloat16),
        "heads": jnp.round(jax.random.normal(keys[2], (4, 512)), 1),
    }


AXES = {"a": None, "b": None, "heads": 0}


OPTIMIZER = scale_by_mofo(0.1, block_axes=AXES)
UPDATE = jax.jit(OPTIMIZER.update)


def test_size_and_content():
    state = OPTIMIZER.init(params())
    assert state.threshold.shape == (1 + 1 + 4,)  # four bytes a block
    assert state.threshold.dtype == jnp.int32
    assert (state.threshold == -1).all()
    updates, state = OPTIMIZER.update(params(), state)
    magnitudes = np.abs(np.asarray(state.inner_state.mu["a"]))
    selected = np.asarray(updates["a"]) != 0
    threshold = np.int32(state.threshold[0]).view(np.float32)
    assert magnitudes[~selected].max() < threshold <= magnitudes[selected].min()


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_guess_gives_the_same_result(guess):
    state = OPTIMIZER.init(params())
    expected, _ = UPDATE(params(), state)
    state = state._replace(threshold=jnp.array(guess, jnp.int32))
    updates, _ = UPDATE(params(), state)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


BY_GRADIENT = filter_by_momentum(optax.sgd(1.0), 0.1, score="gradient")
UPDATE_BY_GRADIENT = jax.jit(BY_GRADIENT.update)
SCALES = [1.0, 1e3, 1.0, 1e-3, 1e-30, 0.0, 1e30, 1.0]


@jax.jit
def kept_by_top_k(gradient):
    mask = top_fraction_mask(gradient, 0.1, method="top_k")
    return jnp.where(mask, -gradient, jnp.zeros_like(gradient))


@pytest.mark.parametrize("kind", ["normal", "equal", "sparse", "rounded", "heavy"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hostile_sequences_stay_exact(kind, dtype, program):
    """Whatever was remembered is wrong by orders of magnitude at the next step."""
    rng = np.random.default_rng(0)
    state = BY_GRADIENT.init({"w": jnp.zeros((64, 640), dtype)})
    for scale in SCALES:
        x = rng.normal(size=(64, 640))
        x = {
            "normal": x,
            "equal": np.sign(x),
            "sparse": x * (rng.random(x.shape) < 0.01),
            "rounded": np.round(x),
            "heavy": np.exp(8 * x),
        }[kind]
        gradient = jnp.asarray(np.clip(x * scale, -3e38, 3e38), dtype)
        updates, state = UPDATE_BY_GRADIENT({"w": gradient}, state)
        np.testing.assert_array_equal(updates["w"], kept_by_top_k(gradient))


def test_a_checkpoint_without_it_fails_with_its_name(tmp_path):
    state = scale_by_mofo(0.1).init(params())
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "old", OldState(*state[:2]))
    checkpointer.wait_until_finished()
    with pytest.raises(ValueError, match="threshold"):
        checkpointer.restore(tmp_path / "old", state)
    # What it has can be restored, and the rest taken from a new state.
    old = checkpointer.restore(tmp_path / "old", OldState(*state[:2]))
    restored = state._replace(**old._asdict())
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    checkpointer.close()


def test_number_of_passes_once_it_remembers(program):
    """A few, where a search by bisection takes some thirty."""
    optimizer = scale_by_mofo(0.1)
    fixed = jax.random.normal(jax.random.key(0), (256, 512))
    state, update, taken = optimizer.init(fixed), jax.jit(optimizer.update), []
    with count_passes() as passes:
        for step in range(30):
            noise = jax.random.normal(jax.random.key(step + 1), fixed.shape)
            _, state = update(fixed + 3 * noise, state)
            taken.append(passes())
    assert min(taken) > 0
    assert np.mean(taken[10:]) < 9
