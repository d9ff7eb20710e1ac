"""Exact counts of array entries, of any size, and without temporaries of theirs.

JAX without x64 has no integers beyond 32 bits, and arrays of more entries exist.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

# An exact non-negative integer of any size as uint32 limbs, most significant first.
Limbs = tuple[jax.Array, ...]

# Counts below this fit one uint32 limb. A name so that a test can lower it.
LIMB_SIZE = 2**32

# XLA on the CPU leaves a reduction over at most 32 entries whole.
_GROUP = 16


def limbs(value: int, limbs: int) -> Limbs:
    return tuple(jnp.uint32(part) for part in divmod(value, 2**32)[2 - limbs :])


def count(marks: jax.Array, axes: tuple[int, ...]) -> Limbs:
    """How many marks are true along the axes, which are kept with size 1."""
    # On the CPU, XLA splits a long reduction into stages and writes out what the
    # first one reads. Groups short enough for one stage are summed as they come.
    counts: Limbs = lax.platform_dependent(
        marks,
        cpu=lambda m: _sum(_sum_groups(m, axes), axes, m.shape),
        default=lambda m: _sum(m, axes, m.shape),
    )
    return counts


def _sum_groups(marks: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Adds up to _GROUP marks that neighbour along one of the axes, as int8."""
    # Within a shard, however the axes are sharded: a group over two would be gathered.
    shards = [math.gcd(size, jax.device_count()) for size in marks.shape]
    group = {a: math.gcd(_GROUP, marks.shape[a] // shards[a]) for a in axes}
    # A longer group first; then an early axis, along which vector units need no
    # shuffles.
    axis = max(axes, key=lambda a: (group[a], -a))
    size = group[axis]
    shape = (*marks.shape[:axis], -1, size, *marks.shape[axis + 1 :])
    return jnp.sum(marks.reshape(shape), axis=axis + 1, dtype=jnp.int8)


def _sum(counts: jax.Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Limbs:
    """Sum along the axes as limbs, of counts that stand for an array of a shape."""
    total = functools.partial(jnp.sum, dtype=jnp.uint32, keepdims=True)
    inner: list[int] = []
    for axis in sorted(axes, key=lambda a: shape[a], reverse=True):
        if math.prod(shape[a] for a in (*inner, axis)) >= LIMB_SIZE:
            break
        inner.append(axis)
    outer = tuple(a for a in axes if a not in inner)
    counts = total(counts, axis=tuple(inner))
    if not outer:
        return (counts,)
    # Digits in base 256 can be summed over 2^24 counts without overflow; carries are
    # passed on afterwards.
    carry = jnp.zeros_like(total(counts, axis=outer))
    low = jnp.zeros_like(carry)
    for shift in (0, 8, 16, 24):
        carry = carry + total((counts >> shift) & 255, axis=outer)
        low = low | ((carry & 255) << shift)
        carry = carry >> 8
    return carry, low


def less(a: Limbs, b: Limbs) -> jax.Array:
    less = a[-1] < b[-1]
    for x, y in zip(a[-2::-1], b[-2::-1], strict=True):
        less = (x < y) | ((x == y) & less)
    return less


def equal(a: Limbs, b: Limbs) -> jax.Array:
    equal = (x == y for x, y in zip(a, b, strict=True))
    return functools.reduce(jnp.logical_and, equal)


def subtract(a: Limbs, b: Limbs) -> Limbs:
    if len(a) == 1:
        return (a[0] - b[0],)
    (a_high, a_low), (b_high, b_low) = a, b
    return a_high - b_high - (a_low < b_low).astype(jnp.uint32), a_low - b_low


def where(condition: jax.Array, a: Limbs, b: Limbs) -> Limbs:
    return tuple(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True))


def bit(position: jax.Array, width: int) -> jax.Array:
    """The integer with that bit set, or 0 for a bit outside the limb."""
    shift = jnp.clip(position, 0, 31).astype(jnp.uint32)
    inside = (position >= 0) & (position < width)
    return jnp.where(inside, jnp.left_shift(jnp.uint32(1), shift), jnp.uint32(0))
