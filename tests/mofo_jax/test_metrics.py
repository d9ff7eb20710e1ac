"""Measures, against sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mofo_jax import distance, top_fraction_norm


def test_distance():
    a = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.array([3.0], jnp.bfloat16)}
    b = {"w": jnp.array([[0.0, 0.0]]), "b": jnp.array([1.0], jnp.bfloat16)}
    assert distance(a, b) == 3.0
    assert distance(a, b).dtype == jnp.float32
    assert distance(jnp.array([3 + 4j]), jnp.array([0j])) == 5.0


def test_distance_of_bfloat16_is_not_rounded_away():
    ones = jnp.ones(10_000, jnp.bfloat16)
    assert distance(ones, 0 * ones) == 100.0


def test_top_fraction_norm():
    rng = np.random.default_rng(0)
    gradients = {"w": rng.normal(size=(4, 10)), "b": rng.normal(size=7)}
    gradients = jax.tree.map(np.float32, gradients)
    largest = lambda x, k: np.sort(np.abs(x), axis=-1)[..., -k:].sum()
    expected = largest(gradients["w"].ravel(), 12) + largest(gradients["b"], 2)
    np.testing.assert_allclose(top_fraction_norm(gradients, 0.3), expected, rtol=1e-6)
    rows = {"w": 0, "b": None}
    expected = largest(gradients["w"], 3) + largest(gradients["b"], 2)
    norm = jax.jit(lambda g, a: top_fraction_norm(g, a, block_axes=rows))
    np.testing.assert_allclose(norm(gradients, 0.3), expected, rtol=1e-6)
    full = sum(np.abs(g).sum() for g in gradients.values())
    np.testing.assert_allclose(top_fraction_norm(gradients, 1.0), full, rtol=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match="reference must have the structure"):
        distance(jnp.ones((3, 1)), jnp.ones((1, 3)))
    # The same names and shapes in other containers.
    with pytest.raises(ValueError, match="reference must have the structure PyTree"):
        distance([jnp.ones(2)], (jnp.ones(2),))
    with pytest.raises(TypeError, match="parameter w has dtype int32"):
        top_fraction_norm({"w": jnp.arange(3)}, 0.5)
    with pytest.raises(ValueError, match="alpha must be in"):
        top_fraction_norm(jnp.ones(3), 0.0)
    with pytest.raises(ValueError, match="out of range for parameter w"):
        top_fraction_norm({"w": jnp.ones(3)}, 0.5, block_axes=1)
