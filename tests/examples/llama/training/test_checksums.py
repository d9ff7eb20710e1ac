"""Checksums of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples.llama.model.sharding import make_mesh
from examples.llama.training.checksums import checksums

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool")


def array(dtype, shape=(8, 6)):
    bits = np.random.default_rng(0).integers(0, 100, size=shape)
    return jnp.asarray(bits % 2 if dtype == "bool" else bits, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_on_any_mesh(dtype):
    x = array(dtype)
    mesh = make_mesh("fsdp=4,tensor=2")
    for spec in (P(), P("fsdp"), P("fsdp", "tensor"), P(None, "tensor")):
        assert checksums(jax.device_put(x, NamedSharding(mesh, spec))) == checksums(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype):
    x = np.array(array(dtype))
    before = checksums(jnp.asarray(x))
    for entry in (0, 17, x.size - 1):
        for bit in range(1 if dtype == "bool" else 8 * x.itemsize):
            changed = x.copy()
            raw = changed.reshape(-1).view(np.uint8)
            raw[entry * x.itemsize + bit // 8] ^= np.uint8(1 << bit % 8)
            assert checksums(jnp.asarray(changed)) != before


def test_position_counts():
    x = array("float32", (4, 5))
    assert len({str(checksums(y)) for y in (x, x.T, x[::-1], jnp.zeros_like(x))}) == 4
    assert checksums(jnp.float32(3)) != checksums(jnp.float32(-3))
