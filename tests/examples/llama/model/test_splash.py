"""The kernel for TPUs, interpreted, gives what attention by its formula gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples.llama.model import attention, splash
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama
from examples.llama.model.sharding import make_mesh

TIME = 256
SEGMENTS = np.repeat(np.array([[1, 1, 2, 0], [1, 2, 3, 3]], np.int32), 64, axis=1)
interpreted = functools.partial(splash.splash, interpret=True)


def mask_of(segment_ids):
    mask = np.tri(TIME, dtype=bool)[None]
    if segment_ids is None:
        return jnp.asarray(mask)
    return jnp.asarray(mask & (segment_ids[:, :, None] == segment_ids[:, None]))


def inputs(dtype, heads=4, shared=2, size=16):
    rng = np.random.default_rng(0)
    shapes = [(2, TIME, n, size) for n in (heads, shared, shared, heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)]
)
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one text", "packed"])
def test_values_and_gradients(dtype, tolerance, segment_ids):
    q, k, v, weights = inputs(dtype)

    def value_and_gradients(attend):
        def total(q, k, v):
            y = attend(q, k, v)
            return jnp.sum((weights * y).astype(jnp.float32)), y

        with jax.numpy_dtype_promotion("standard"):
            gradient = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
            return jax.tree.leaves(jax.jit(gradient)(q, k, v))

    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    found = value_and_gradients(lambda *args: interpreted(*args, ids))
    mask = mask_of(segment_ids)
    expected = value_and_gradients(lambda *args: attention.attend(*args, mask))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


# Of six query heads for three key heads, tensor=2 divides neither as groups.
@pytest.mark.parametrize(("heads", "shared"), [(4, 2), (6, 3)])
def test_on_a_mesh(heads, shared):
    q, k, v, _ = inputs("float32", heads, shared)
    ids = jnp.asarray(SEGMENTS)
    expected = attention.attend(q, k, v, mask_of(SEGMENTS))
    mesh = make_mesh("fsdp=2,tensor=2")
    rows = NamedSharding(mesh, P("fsdp"))
    q, k, v, ids = (jax.device_put(x, rows) for x in (q, k, v, ids))
    with jax.set_mesh(mesh):
        found = jax.jit(interpreted)(q, k, v, ids)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_models_on_tpus_use_it(monkeypatch, packed):
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Llama(shape, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(64, size=(2, TIME)))
    ids = jnp.asarray(SEGMENTS) if packed else None
    expected = model.hidden(tokens, segment_ids=ids)
    called = []

    def counted(q, k, v, segment_ids):
        called.append(segment_ids is not None)
        return interpreted(q, k, v, segment_ids)

    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(splash, "splash", counted)
    found = model.hidden(tokens, segment_ids=ids)
    assert called == [packed] * 2
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # Of another length, and with a mask, as before.
    for length, mask in ((100, None), (TIME, jnp.ones((2, TIME), bool))):
        model(tokens[:, :length], mask=mask)
    assert len(called) == 2
