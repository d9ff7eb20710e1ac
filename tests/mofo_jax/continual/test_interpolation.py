"""Interpolation between two models' weights."""

import chex
import jax.numpy as jnp
import pytest

from mofo_jax.continual import interpolate

START = {"a": {"w": jnp.array([0.0, 2.0])}, "b": jnp.array([1.0])}
END = {"a": {"w": jnp.array([4.0, -2.0])}, "b": jnp.array([3.0])}


def test_by_hand():
    expected = {"a": {"w": jnp.array([1.0, 1.0])}, "b": jnp.array([1.5])}
    chex.assert_trees_all_close(interpolate(START, END, 0.25), expected)


@pytest.mark.parametrize(("weight", "side"), [(0.0, START), (1.0, END)])
def test_ends_are_exact(weight, side):
    chex.assert_trees_all_equal(interpolate(START, END, weight), side)


def test_by_name():
    found = interpolate(START, END, {"a/w": 0.5, "b": 2}.get)
    expected = {"a": {"w": jnp.array([2.0, 0.0])}, "b": jnp.array([5.0])}
    chex.assert_trees_all_close(found, expected)


def test_low_precision():
    """In bfloat16 256 + 1 would be 256 again; the mean is taken in float32."""
    start, end = jnp.array([256.0], jnp.bfloat16), jnp.array([260.0], jnp.bfloat16)
    found = interpolate(start, end, 0.5)
    assert found.dtype == jnp.bfloat16 and found[0] == 258


def test_bad_weight():
    with pytest.raises(TypeError, match="weight must be a number or a function of"):
        interpolate(START, END, "half")


def test_bad_shapes():
    with pytest.raises(ValueError, match="tuned must have the structure and shapes"):
        interpolate(START, {"a": END["a"]}, 0.5)
