"""Checksums of arrays, by which a damaged checkpoint is told from a good one."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def checksums(tree: Any) -> dict[str, str]:
    """A checksum for each array of a tree, by its path. It is the same on any mesh.

    A checksum is two sums modulo 2^32 over the bits of the entries, in the second of
    which each entry counts by its position. So a change of one entry always shows, and
    other damage does but for rare coincidences.
    """
    # One at a time: on one core, simulated devices wait for each other in vain where
    # many programs are on their way.
    found = {
        jax.tree_util.keystr(path): jax.device_get(_sums(leaf))
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    return {name: "".join(f"{int(x):08x}" for x in two) for name, two in found.items()}


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # Of entries of 64 bits, an array with two words each.
    bits = jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]).astype(jnp.uint32)
    # Odd, so that no bit is lost by the product. No reshaping, which would move shards.
    position = jnp.full(bits.shape, 1, jnp.uint32)
    for axis, stride in enumerate(_strides(bits.shape)):
        counted = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position += counted * jnp.uint32(2 * stride % 2**32)
    return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * position, dtype=jnp.uint32)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
