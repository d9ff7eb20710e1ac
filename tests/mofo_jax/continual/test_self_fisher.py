"""The Fisher information of own texts: that of the texts which the model draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mofo_jax.continual import (
    FactoredFisher,
    draw_texts,
    fisher_diagonal,
    self_fisher,
)

PARAMS = {"table": jnp.linspace(-1, 1, 36).reshape(6, 6), "bias": jnp.zeros(6)}
OPTIONS = {"bos_id": 0, "end_ids": [5], "key": jax.random.key(3), "batch_size": 4}


def sample(prompts, key):
    """Four tokens, each by the logits of the one before it."""

    def step(token, key):
        logits = PARAMS["table"][token] + PARAMS["bias"][None]
        token = jax.random.categorical(key, logits)
        return token, token

    return jax.lax.scan(step, prompts[:, 0], jax.random.split(key, 4))[1].T


@jax.jit
@jax.grad
def gradient(params, tokens):
    log_p = jax.nn.log_softmax(params["table"][tokens[:-1]] + params["bias"][None])
    return -jnp.sum(jnp.take_along_axis(log_p, tokens[1:, None], axis=1))


@pytest.mark.parametrize("factored", [True, False])
def test_that_of_the_texts_drawn(factored):
    texts = [jnp.array(text) for text in draw_texts(sample, 10, **OPTIONS)]
    assert len(set(map(len, texts))) > 1  # some end early
    expected = fisher_diagonal(gradient, PARAMS, texts, factored=factored)
    found = self_fisher(gradient, PARAMS, sample, 10, factored=factored, **OPTIONS)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert isinstance(found["table"], FactoredFisher) == factored
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_factored_by_default():
    found = self_fisher(gradient, PARAMS, sample, 2, **OPTIONS)
    assert isinstance(found["table"], FactoredFisher)
    assert found["bias"].shape == (6,)


def test_texts_are_integers_and_drawn_when_needed():
    events = []

    def noted_sample(prompts, key):
        events.append("drawn")
        return sample(prompts, key)

    def noted_gradient(params, text):
        assert isinstance(text, np.ndarray) and text.dtype == np.int32
        assert text[0] == 0 and 2 <= len(text) <= 5
        events.append("gradient")
        return gradient(params, text)

    self_fisher(noted_gradient, PARAMS, noted_sample, 6, **OPTIONS)
    assert events == ["drawn", *["gradient"] * 4, "drawn", *["gradient"] * 2]


def test_progress():
    calls = []
    plain = self_fisher(gradient, PARAMS, sample, 6, **OPTIONS)
    counted = self_fisher(
        gradient,
        PARAMS,
        sample,
        6,
        progress=lambda *numbers: calls.append(numbers),
        **OPTIONS,
    )
    assert calls == [(done, 6) for done in range(1, 7)]
    jax.tree.map(np.testing.assert_array_equal, counted, plain)


def test_stays_on_the_mesh():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    over = {"table": NamedSharding(mesh, P("x")), "bias": NamedSharding(mesh, P())}
    params = jax.device_put(PARAMS, over)
    dense = self_fisher(gradient, params, sample, 6, factored=False, **OPTIONS)
    plain = self_fisher(gradient, PARAMS, sample, 6, factored=False, **OPTIONS)
    assert dense["table"].sharding.device_set == set(mesh.devices.flat)
    for name, leaf in dense.items():
        np.testing.assert_allclose(leaf, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["count", "batch_size", "bos_id"])
def test_bad_integers(name):
    options = OPTIONS | {"count": 2}
    with pytest.raises(ValueError, match=f"{name} must be [01] or above, got -1"):
        self_fisher(gradient, PARAMS, sample, **options | {name: -1})
    with pytest.raises(TypeError, match=f"{name} must be an integer, got None"):
        self_fisher(gradient, PARAMS, sample, **options | {name: None})


def test_bad_samples():
    with pytest.raises(ValueError, match=r"sample must return integers \[4, N\]"):
        self_fisher(gradient, PARAMS, lambda prompts, key: prompts[0], 2, **OPTIONS)
