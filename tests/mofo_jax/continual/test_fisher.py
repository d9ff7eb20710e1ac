"""The Fisher information against known results; factors against the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mofo_jax.continual import (
    FactoredFisher,
    fisher_diagonal,
    fisher_probe,
    scale_by_fisher,
)

PARAMS = {
    "kernel": jnp.zeros((6, 4)),
    "stacked": jnp.zeros((3, 6, 4)),
    "bias": jnp.zeros(4),
    "scale": jnp.zeros(()),
    "empty": jnp.zeros((0, 3)),
}


def random_gradient(params, key):
    return jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), params)


def test_fisher_of_logistic_regression():
    """At the true parameters it is x^2 p (1 - p), in the mean over drawn labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 2))
    w = np.array([0.5, -1.0])
    p = 1 / (1 + np.exp(-x @ w))
    y = rng.random(4000) < p

    def loss(w, example):
        logit = jnp.dot(example[0], w)
        return optax.sigmoid_binary_cross_entropy(logit, example[1])

    examples = [(jnp.float32(a), jnp.float32(b)) for a, b in zip(x, y, strict=True)]
    fisher = fisher_diagonal(jax.jit(jax.grad(loss)), jnp.float32(w), examples)
    exact = np.mean(x**2 * (p * (1 - p))[:, None], axis=0)
    np.testing.assert_allclose(fisher, exact, rtol=0.1)


def test_probe_is_that_of_the_softmax():
    """J' (diag(p) - p p') J, of every position that counts."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)  # positions, features
    w = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    mask = jnp.array([True, False, True])
    p = np.asarray(jax.nn.softmax(x @ w))
    variance = p * (1 - p) * np.asarray(mask)[:, None]
    exact = np.einsum("ti,tj->ij", np.square(x), variance)

    @jax.jit
    @jax.grad
    def gradient(w, key):
        return fisher_probe(x @ w, key, mask)

    keys = jax.random.split(jax.random.key(0), 3000)
    found = fisher_diagonal(gradient, w, keys)
    np.testing.assert_allclose(found, exact, rtol=0.1)


def test_probe_of_a_sure_model():
    """One probe sees the unlikely answers, which hardly any drawn one would be."""
    logits = jnp.array([12.0, 0.0, 0.0])
    p = jax.nn.softmax(logits)
    probed = jnp.square(jax.grad(fisher_probe)(logits, jax.random.key(0)))
    np.testing.assert_allclose(probed[1:], (p * (1 - p))[1:], rtol=0.02)


def test_probe_of_low_precision():
    probe = fisher_probe(jnp.ones((2, 3), jnp.bfloat16), jax.random.key(0))
    assert probe.dtype == jnp.float32 and probe.shape == ()


def test_fisher_needs_examples():
    with pytest.raises(ValueError, match="examples must be one or more"):
        fisher_diagonal(lambda p, x: p, PARAMS, [])


def test_fisher_of_low_precision_is_float32():
    params = jnp.ones(3, jnp.bfloat16)
    fisher = fisher_diagonal(lambda p, x: p * x, params, [jnp.bfloat16(1e-3)])
    assert fisher.dtype == jnp.float32 and (fisher > 0).all()


def test_fisher_of_complex_gradients_is_real():
    fisher = fisher_diagonal(lambda p, x: p * x, jnp.ones(2, jnp.complex64), [3 + 4j])
    assert fisher.dtype == jnp.float32
    np.testing.assert_allclose(fisher, 25.0)


def test_factors_are_the_means_of_the_dense_one():
    keys = list(jax.random.split(jax.random.key(0), 5))
    dense = fisher_diagonal(random_gradient, PARAMS, keys)
    factored = fisher_diagonal(random_gradient, PARAMS, iter(keys), factored=True)
    for name in ("kernel", "stacked"):
        rows, columns = factored[name]
        np.testing.assert_allclose(rows, dense[name].mean(-1), rtol=1e-5)
        np.testing.assert_allclose(columns, dense[name].mean(-2), rtol=1e-5)
    for name in ("bias", "scale", "empty"):
        np.testing.assert_array_equal(factored[name], dense[name])
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(factored)
    ]
    assert {"kernel/rows", "stacked/columns", "bias"} <= set(names)


def test_factors_of_low_precision_are_float32():
    params = jnp.ones((3, 2), jnp.bfloat16)
    gradient = lambda p, x: p * x
    fisher = fisher_diagonal(gradient, params, [jnp.bfloat16(1e-3)], factored=True)
    assert {x.dtype for x in fisher} == {jnp.dtype("float32")}


def test_factors_of_an_nnx_state():
    graph, params = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))

    @jax.jit
    @jax.grad
    def gradient(params, x):
        return jnp.sum(jnp.square(nnx.merge(graph, params)(x)))

    examples = [jnp.ones((2, 4)), jnp.arange(8.0).reshape(2, 4)]
    fisher = fisher_diagonal(gradient, params, examples, factored=True)
    optimizer = optax.chain(optax.scale_by_adam(), scale_by_fisher())
    updates = gradient(params, examples[0])
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
        new, _ = optimizer.update(
            updates, optimizer.init(params), params, fisher=fisher
        )
    assert jax.tree.structure(new) == jax.tree.structure(params)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_factors_stay_sharded(axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("x", "y"))
        params = jax.device_put(jnp.ones((8, 4)), sharding)
        examples = [jnp.float32(1.0), jnp.float32(3.0)]
        gradient = jax.jit(lambda p, x: p * x)
        fisher = fisher_diagonal(gradient, params, examples, factored=True)
        assert isinstance(fisher, FactoredFisher)
        for factor, axis in zip(fisher, ("x", "y"), strict=True):
            np.testing.assert_allclose(factor, 5.0)
            spec = NamedSharding(mesh, P(axis))
            assert factor.sharding.is_equivalent_to(spec, 1)


def test_factored_pass_holds_no_more_than_a_gradient():
    """Of three examples; what goes from one to the next is a row and a column."""
    params = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    example = jax.ShapeDtypeStruct((), jnp.float32)

    @jax.jit
    def estimate(p, x):
        return fisher_diagonal(lambda p, x: p * x, p, [x, x, x], factored=True)

    analysis = estimate.lower(params, example).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 1.1 * 4 * 512 * 256
    assert analysis.output_size_in_bytes < 1.1 * 4 * (512 + 256)
