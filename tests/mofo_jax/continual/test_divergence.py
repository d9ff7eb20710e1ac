"""The divergence from the pretrained model, beside SciPy's in float64."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from mofo_jax.continual import forward_kl


def test_by_hand():
    model = jnp.log(jnp.array([0.25, 0.75]))
    reference = jnp.log(jnp.array([0.5, 0.5]))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert float(forward_kl(model, reference)) == pytest.approx(expected, rel=1e-6)
    # The other direction is another number.
    reverse = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert float(forward_kl(reference, model)) == pytest.approx(reverse, rel=1e-6)


shapes = hypothesis.extra.numpy.array_shapes(min_dims=1, max_dims=3, max_side=5)
pairs = shapes.flatmap(
    lambda shape: st.tuples(
        *[
            hypothesis.extra.numpy.arrays(
                np.float32, shape, elements=st.floats(-9, 9, width=32)
            )
        ]
        * 2
    )
)


@pytest.mark.thorough
@hypothesis.given(pairs)
def test_equals_relative_entropy(logits):
    model, reference = logits
    found = forward_kl(model, reference)
    p, q = (softmax(np.float64(x), axis=-1) for x in (reference, model))
    expected = rel_entr(p, q).sum(axis=-1)
    assert found.dtype == jnp.float32 and found.shape == model.shape[:-1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.all(np.asarray(forward_kl(model, model)) == 0)


def test_gradient():
    """That of a softmax's cross-entropy with soft targets; the reference has none."""
    rng = np.random.default_rng(0)
    model, reference = jnp.asarray(rng.normal(size=(2, 3, 7)), jnp.float32)
    total = lambda *logits: jnp.sum(forward_kl(*logits))
    found, none = jax.jit(jax.grad(total, (0, 1)))(model, reference)
    expected = softmax(model, axis=-1) - softmax(reference, axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.any(none)


def test_tokens_that_are_ruled_out():
    model, reference = jnp.array([1.0, 2.0, 0.5]), jnp.array([0.0, 1.5, -jnp.inf])
    both = model.at[2].set(-jnp.inf)
    for q in (model, both):
        value, gradient = jax.value_and_grad(forward_kl)(q, reference)
        p, log_q = softmax(reference), log_softmax(q)
        expected = np.sum(p[:2] * (np.log(p[:2]) - log_q[:2]))
        assert float(value) == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(gradient, softmax(q) - p, atol=1e-6)
    assert forward_kl(both, model) == jnp.inf


def test_low_precision_is_raised():
    """A divergence of 1e-4 and less is lost where sums are in bfloat16."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 4, 500)), jnp.bfloat16)
    found = forward_kl(logits[0], logits[1])
    wide = forward_kl(logits[0].astype(jnp.float32), logits[1])
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, wide)


def test_bad_arguments():
    logits = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"shape of logits, \[2, 3\], got \[3\]"):
        forward_kl(logits, logits[0])
    with pytest.raises(ValueError, match=r"logits must have the shape \[..., V\]"):
        forward_kl(1.0, 1.0)
    with pytest.raises(TypeError, match="logits must be floating, got int32"):
        forward_kl(jnp.arange(3), logits[0])
    with pytest.raises(TypeError, match="reference_logits must be floating, got bool"):
        forward_kl(logits, jnp.ones((2, 3), bool))
