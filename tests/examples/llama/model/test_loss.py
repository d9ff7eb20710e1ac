"""Chunked losses beside the plain ones, and the memory that they save."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama.model.loss import (
    cross_entropy_sum,
    kl_sum,
    log_probabilities,
    probe_sum,
)

B, T, D, V = 3, 11, 8, 37


def inputs(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(V, size=(B, T)), jnp.int32)
    return hidden, head, targets, jnp.asarray(rng.random((B, T)) < 0.6)


def plain(hidden, head, targets, mask):
    kernel = head.astype(hidden.dtype)
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses, where=mask)


# One position to a chunk, some, with the last chunk padded, and all of them.
@pytest.mark.parametrize("positions", [1, 4, 11])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)]
)
def test_equals_the_plain_loss(positions, dtype, tolerance):
    args = inputs(dtype)
    size = 4 * B * V * positions

    def chunked(*args):
        return 0.25 * cross_entropy_sum(*args, chunk_bytes=size)

    def scaled(*args):
        return 0.25 * plain(*args)

    assert float(chunked(*args)) == pytest.approx(float(scaled(*args)), rel=1e-5)
    # Compiled, and of a tied head: fusions that failed for bfloat16 (jax 0.10.2).
    tied = lambda x, head, *rest: chunked(x, head.T, *rest)
    compiled = jax.jit(jax.value_and_grad(tied, argnums=(0, 1)))
    value, found = compiled(args[0], args[1].T, *args[2:])
    found = found[0], found[1].T
    assert float(value) == pytest.approx(float(chunked(*args)), rel=1e-6)
    expected = jax.grad(scaled, argnums=(0, 1))(*args)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("places", [1, 3, 7])
def test_log_probabilities(places):
    """At places that repeat and are in any order, as a plain softmax has them."""
    hidden, head, _, _ = inputs()
    rng = np.random.default_rng(1)
    where = jnp.asarray(rng.integers(T, size=(B, 7)), jnp.int32)
    targets = jnp.asarray(rng.integers(V, size=(B, 7)), jnp.int32)
    every = np.asarray(jax.nn.log_softmax(hidden @ head))
    rows = np.arange(B)[:, None]
    targets = targets.at[0, 2].set(int(every[0, where[0, 2]].argmax()))
    size = 4 * B * V * places
    logs, first = log_probabilities(hidden, head, where, targets, chunk_bytes=size)
    np.testing.assert_allclose(logs, every[rows, where, targets], rtol=1e-5)
    np.testing.assert_array_equal(first, every.argmax(-1)[rows, where] == targets)
    assert first[0, 2]


def test_masked_positions_count_for_nothing():
    hidden, head, targets, mask = inputs()
    odd = jnp.where(mask[..., None], hidden, jnp.float32(1e3))
    other = jnp.where(mask, targets, 0)
    assert cross_entropy_sum(odd, head, other, mask) == cross_entropy_sum(
        hidden, head, targets, mask
    )
    gradient = jax.grad(cross_entropy_sum)(hidden, head, targets, mask)
    assert not np.any(np.asarray(gradient)[~np.asarray(mask)])


@pytest.mark.parametrize("positions", [1, 4, 11])
def test_kl(positions):
    (hidden, head, _, mask), (other, other_head, _, _) = inputs(), inputs(seed=1)
    size = 4 * B * V * positions
    found = kl_sum(hidden, head, other, other_head, mask, chunk_bytes=size)
    log_q, log_p = (
        np.asarray(jax.nn.log_softmax(x @ w), np.float64)
        for x, w in ((hidden, head), (other, other_head))
    )
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)[np.asarray(mask)].sum()
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(kl_sum(hidden, head, hidden, head, mask)) == pytest.approx(0, abs=1e-5)


def test_weighted_kl_and_its_gradient():
    (hidden, head, _, _), (other, other_head, _, _) = inputs(), inputs(seed=1)
    weights = jnp.asarray(np.random.default_rng(2).random((B, T)), jnp.float32)

    def whole(hidden, head):
        log_q = jax.nn.log_softmax(hidden @ head)
        log_p = jax.nn.log_softmax(other @ other_head)
        return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    def chunked(hidden, head):
        size = 4 * B * V * 4
        return kl_sum(hidden, head, other, other_head, weights, chunk_bytes=size)

    found = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    expected = jax.value_and_grad(whole, (0, 1))(hidden, head)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_buffer_holds_all_logits():
    """Of 4 x 256 positions and 4,096 tokens, float32, that would be 16 MiB."""
    shapes = ((4, 256, 32), jnp.float32), ((32, 4096), jnp.float32)
    args = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (*shapes, ((4, 256), jnp.int32), ((4, 256), jnp.bool))
    ]

    def temporary(loss):
        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return gradients.lower(*args).compile().memory_analysis().temp_size_in_bytes

    def chunked(*args):
        return cross_entropy_sum(*args, chunk_bytes=1 << 20)

    assert temporary(plain) > 16 << 20
    assert temporary(chunked) < 6 << 20


@pytest.mark.parametrize("positions", [1, 4, 11])
def test_squared_gradient_of_the_probe_is_the_fisher_information(positions):
    """That of the head is the sum of h^2 p (1 - p) over the positions that count."""
    hidden, head, _, mask = inputs()

    @jax.jit
    @jax.vmap
    def squares(key):
        probe = lambda head: probe_sum(
            hidden, head, mask, key, chunk_bytes=4 * B * V * positions
        )
        return jnp.square(jax.grad(probe)(head))

    found = jnp.mean(squares(jax.random.split(jax.random.key(0), 4000)), axis=0)
    p = jnp.where(mask[..., None], jax.nn.softmax(hidden @ head), 0.0)
    expected = jnp.einsum("btd,btv->dv", hidden**2, p - p**2)
    error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
    assert float(error) < 0.05
