"""GEM's projection, beside a general solver and cases that can be done by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy.optimize import minimize

from mofo_jax.continual import project_gradient

pytestmark = pytest.mark.thorough

PROJECT = jax.jit(project_gradient, static_argnames="margin")


def solved(gradient, memories, margin):
    """By scipy's L-BFGS-B on the dual programme, in float64."""
    memories, gradient = np.float64(memories), np.float64(gradient)
    gram, against = memories @ memories.T, memories @ gradient
    if (against >= 0).all():
        return gradient
    found = minimize(
        lambda v: (0.5 * v @ gram @ v + against @ v, gram @ v + against),
        np.full(len(gram), margin),
        jac=True,
        bounds=[(margin, None)] * len(gram),
        options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 10_000},
    )
    return gradient + found.x @ memories


def test_one_memory_by_hand():
    """The part against it is taken away, and nothing else."""
    gradient = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([1.0])}
    memory = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([0.0])}
    found = project_gradient(gradient, [memory])
    expected = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([1.0])}
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_margin_by_hand():
    """v is 0.5 where 0.1 would do, and 2 where that is needed."""
    gradient, memory = jnp.array([1.0, -0.1]), jnp.array([0.0, 1.0])
    found = project_gradient(gradient, [memory], margin=0.5)
    np.testing.assert_allclose(found, [1.0, 0.4], atol=1e-6)
    found = project_gradient(jnp.array([1.0, -2.0]), [memory], margin=0.5)
    np.testing.assert_allclose(found, [1.0, 0.0], atol=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_agreeing_gradients_stay(margin):
    gradient = jnp.array([0.1, 0.7, 1e-30])
    memories = [jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 3.0, 1.0]), jnp.zeros(3)]
    found = project_gradient(gradient, memories, margin=margin)
    np.testing.assert_array_equal(found, gradient)


@settings(max_examples=60, deadline=None)
@given(
    tasks=st.sampled_from([1, 2, 5]),
    size=st.sampled_from([3, 40]),
    margin=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_random(tasks, size, margin, seed):
    rng = np.random.default_rng(seed)
    gradient = rng.normal(size=size)
    # More and more alike, and of very different lengths.
    common = rng.normal(size=size) * rng.choice([0, 1, 3])
    memories = common + rng.normal(size=(tasks, size))
    memories *= 10.0 ** rng.integers(-1, 2, size=(tasks, 1))
    found = PROJECT(jnp.float32(gradient), list(jnp.float32(memories)), margin=margin)
    expected = solved(gradient, memories, margin)
    scale = np.linalg.norm(expected) + np.linalg.norm(gradient)
    assert np.linalg.norm(found - expected) < 5e-3 * scale
    if margin == 0:
        lengths = np.linalg.norm(memories, axis=1)
        assert ((memories @ found) / lengths > -1e-3 * scale).all()


def test_same_memory_twice():
    memory = jnp.array([0.0, 2.0, 0.0])
    found = project_gradient(jnp.array([1.0, -1.0, 1.0]), [memory, memory, memory])
    np.testing.assert_allclose(found, [1.0, 0.0, 1.0], atol=1e-5)


def test_many_tasks():
    rng = np.random.default_rng(0)
    memories = np.float32(rng.normal(size=(20, 200)))
    gradient = np.float32(rng.normal(size=200)) - 0.2 * memories.sum(axis=0)
    found = project_gradient(jnp.array(gradient), list(jnp.array(memories)))
    np.testing.assert_allclose(found, solved(gradient, memories, 0.0), atol=1e-3)


def test_per_tensor():
    """Each leaf by itself, also where the whole gradient opposes no memory."""
    gradient = {"a": jnp.array([-1.0, 1.0]), "b": jnp.array([9.0])}
    memory = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([1.0])}
    whole = project_gradient(gradient, [memory])
    chex.assert_trees_all_equal(whole, gradient)
    found = project_gradient(gradient, [memory], per_tensor=True)
    expected = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([9.0])}
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_no_memories():
    gradient = {"a": jnp.ones(2)}
    assert project_gradient(gradient, []) is gradient


def test_dtypes_and_jit():
    gradient = {"a": jnp.ones(4, jnp.bfloat16), "b": -jnp.ones(2)}
    memory = {"a": -jnp.ones(4, jnp.bfloat16), "b": jnp.ones(2)}
    found = jax.jit(lambda g, m: project_gradient(g, [m]))(gradient, memory)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, gradient)
    np.testing.assert_allclose(found["b"], 0, atol=1e-5)


def test_on_a_mesh():
    """The same as on one device; only numbers, no gradients, are exchanged."""
    mesh = jax.make_mesh((8,), ("x",))
    rng = np.random.default_rng(0)
    tree = {"w": (64, 16), "b": (8,)}
    trees = [
        {k: jnp.float32(rng.normal(size=s)) for k, s in tree.items()} for _ in range(3)
    ]
    trees[0] = jax.tree.map(lambda g, m: g - m, trees[0], trees[1])
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    sharded = jax.device_put(trees, sharding)

    @jax.jit
    def project(gradient, *memories):
        return project_gradient(gradient, memories, per_tensor=True)

    found = project(*sharded)
    assert found["w"].sharding.is_equivalent_to(sharding, 2)
    chex.assert_trees_all_close(found, project(*trees), rtol=1e-4, atol=1e-5)
    text = project.lower(*sharded).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text


@pytest.mark.parametrize("margin", [-0.5, float("nan"), None])
def test_bad_margin(margin):
    with pytest.raises(ValueError, match="margin must be a number, 0 or above"):
        project_gradient(jnp.ones(2), [jnp.ones(2)], margin=margin)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"memories\[1\] must have the structure"):
        project_gradient(jnp.ones(2), [jnp.ones(2), jnp.ones(3)])
