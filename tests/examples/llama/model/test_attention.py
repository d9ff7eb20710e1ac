"""Attention by its formula in float64, and its gradients by JAX's own attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama.model.attention import attend


def inputs(time, heads, shared, dtype, size=6):
    rng = np.random.default_rng(time)
    return [
        jnp.asarray(rng.normal(size=(2, time, n, size)), dtype)
        for n in (heads, shared, shared)
    ]


def formula(q, k, v, mask):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
    weights = np.exp(np.where(mask[:, None], scores, -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, v)


# Fewer positions than parts, parts of unequal lengths, and equal ones.
@pytest.mark.parametrize("time", [1, 3, 9, 16])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 1)])
def test_causal(time, heads, shared):
    q, k, v = inputs(time, heads, shared, jnp.float32)
    expected = formula(q, k, v, np.tri(time, dtype=bool)[None])
    np.testing.assert_allclose(attend(q, k, v, None), expected, atol=1e-5)


def test_mask():
    q, k, v = inputs(7, 4, 2, jnp.float32)
    rng = np.random.default_rng(0)
    mask = (rng.random((2, 7, 7)) < 0.5) | np.eye(7, dtype=bool)
    found = attend(q, k, v, jnp.asarray(mask))
    np.testing.assert_allclose(found, formula(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)]
)
def test_gradients(dtype, tolerance):
    args = inputs(10, 4, 2, jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=args[0].shape))

    def total(attention):
        def loss(*args):
            return jnp.sum(weights.astype(args[0].dtype) * attention(*args))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    def reference(*args):
        return jax.nn.dot_product_attention(*args, is_causal=True)

    low = [x.astype(dtype) for x in args]
    found = total(lambda *args: attend(*args, None))(*low)
    expected = total(reference)(*(x.astype(jnp.float32) for x in low))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)
