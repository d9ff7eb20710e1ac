"""Penalties on the distance from reference parameters, beside automatic gradients."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from mofo_jax import filter_by_momentum
from mofo_jax.continual import FactoredFisher, add_distance_penalty

PARAMS = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([[3.0]])}
REFERENCE = {"a": jnp.array([0.0, -2.0, 1.0]), "b": jnp.array([[1.0]])}
GRADIENTS = {"a": jnp.array([0.1, 0.2, 0.3]), "b": jnp.array([[0.4]])}


@jax.numpy_dtype_promotion("standard")  # Optax mixes dtypes
def updates_of(transformation, **extra):
    state = transformation.init(PARAMS)
    return transformation.update(GRADIENTS, state, PARAMS, **extra)[0]


def test_by_hand():
    updates = updates_of(add_distance_penalty(l1=1.0, l2=10.0), reference=REFERENCE)
    expected = {"a": jnp.array([21.1, 0.2, -10.7]), "b": jnp.array([[41.4]])}
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_ewc_by_hand():
    fisher = {"a": jnp.array([2.0, 1.0, 0.0]), "b": jnp.array([[0.5]])}
    updates = updates_of(
        add_distance_penalty(l1=1.0, ewc=10.0), reference=REFERENCE, fisher=fisher
    )
    expected = {"a": jnp.array([21.1, 0.2, -0.7]), "b": jnp.array([[11.4]])}
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    # The others have no use for it.
    plain = updates_of(add_distance_penalty(l2=1.0), reference=REFERENCE)
    with_it = updates_of(
        add_distance_penalty(l2=1.0), reference=REFERENCE, fisher=fisher
    )
    chex.assert_trees_all_equal(plain, with_it)


@jax.numpy_dtype_promotion("standard")
def test_ewc_with_factors():
    """The same as with the dense leaf of rank one that they stand for."""
    dense = {"a": jnp.array([2.0, 1.0, 0.0]), "b": jnp.array([[0.5]])}
    factored = {**dense, "b": FactoredFisher(jnp.array([0.5]), jnp.array([0.5]))}
    ewc = add_distance_penalty(ewc=10.0)
    chex.assert_trees_all_equal(
        updates_of(ewc, reference=REFERENCE, fisher=factored),
        updates_of(ewc, reference=REFERENCE, fisher=dense),
    )


def test_is_the_gradient_of_the_penalty():
    # Nowhere at distance zero, where an absolute value has no gradient.
    reference = jax.tree.map(lambda x: x + 0.25, REFERENCE)

    def penalty(params):
        moved = jax.tree.map(jnp.subtract, params, reference)
        return 0.3 * optax.tree.norm(moved, ord=1) + 0.7 * optax.tree.norm(moved) ** 2

    updates = updates_of(add_distance_penalty(l1=0.3, l2=0.7), reference=reference)
    total = jax.tree.map(jnp.add, GRADIENTS, jax.grad(penalty)(PARAMS))
    chex.assert_trees_all_close(updates, total, rtol=1e-6)


def test_coupled_and_decoupled():
    """Adam rescales what comes before it; what comes after it stays as it is."""
    penalty = add_distance_penalty(l2=0.5)
    adam = optax.scale_by_adam()
    plain = updates_of(adam)
    coupled = updates_of(optax.chain(penalty, adam), reference=REFERENCE)
    decoupled = updates_of(optax.chain(adam, penalty), reference=REFERENCE)
    # Adam's first update is the sign of its gradient.
    chex.assert_trees_all_close(coupled["a"], jnp.array([1.0, 1.0, -1.0]), rtol=1e-5)
    moved = jax.tree.map(jnp.subtract, PARAMS, REFERENCE)
    expected = jax.tree.map(jnp.add, plain, moved)
    chex.assert_trees_all_close(decoupled, expected, rtol=1e-5)


def test_within_a_momentum_filter():
    inner = optax.chain(add_distance_penalty(l2=0.5), optax.scale_by_adam())
    updates = updates_of(filter_by_momentum(inner, 0.34), reference=REFERENCE)
    assert (updates["a"] != 0).tolist() == [True, False, False]


def test_dtypes_stay():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    penalty = add_distance_penalty(l1=1e-3, l2=1e-3)
    gradients = jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADIENTS)
    updates, state = jax.jit(penalty.update)(
        gradients, penalty.init(params), params, reference=REFERENCE
    )
    chex.assert_trees_all_equal_dtypes(updates, params)
    assert not jax.tree.leaves(state)


@pytest.mark.parametrize("name", ["l1", "l2", "ewc"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1"])
def test_bad_strengths(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number, 0 or above"):
        add_distance_penalty(**{name: value})


def test_what_update_needs():
    penalty = add_distance_penalty(l2=1.0)
    with pytest.raises(ValueError, match="needs params and reference"):
        penalty.update(GRADIENTS, penalty.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="reference must have the structure"):
        updates_of(penalty, reference={"a": REFERENCE["a"]})
    ewc = add_distance_penalty(ewc=1.0)
    with pytest.raises(ValueError, match="ewc needs the extra argument fisher"):
        updates_of(ewc, reference=REFERENCE)
    with pytest.raises(ValueError, match="fisher must have the structure"):
        updates_of(ewc, reference=REFERENCE, fisher={"a": REFERENCE["a"]})
