"""Exact counts of array entries, of any size, and without temporaries of theirs.

JAX without x64 has no integers beyond 32 bits, and arrays of more entries exist.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

# An exact non-negative integer of any size as uint32 limbs, most significant first.
Limbs = tuple[jax.Array, ...]

# Counts and indices below this fit one limb. A name so that a test can lower it.
LIMB_SIZE = 2**31

# From how many places memory is read at once: a core needs some to read it as fast as
# it can.
STREAMS = 4

# With more operands than some ten, XLA on the CPU writes out what a reduction reads.
_OPERANDS = 8

# XLA on the CPU leaves a reduction over at most 32 entries whole.
_GROUP = 16


def on_one_cpu_device() -> bool:
    """Whether programs of this process run on a single CPU device, most likely.

    A wrong guess, as when lowering for another platform, costs time only.
    """
    return jax.device_count() == 1 and jax.default_backend() == "cpu"


def limbs(values: list[int], limbs: int) -> Limbs:
    """Integers ``[1, len(values)]``."""
    parts = zip(*(divmod(value, 2**32)[2 - limbs :] for value in values), strict=True)
    return tuple(jnp.asarray(np.array([part], np.uint32)) for part in parts)


def count(marks: list[jax.Array], axes: tuple[int, ...], zero: jax.Array) -> Limbs:
    """How many marks are true along the axes: ``[len(marks), other entries]``.

    The arrays are of one shape. ``zero`` is an int32 scalar of value 0 that the
    compiler cannot know to be 0.
    """
    # On the CPU, XLA splits a long reduction into stages and writes out what the
    # first one reads. It leaves one of several operands whole, if all of them matter...
    last = marks[0].ndim - 1
    if on_one_cpu_device() and last in axes and marks[0].shape[last] < LIMB_SIZE:
        return tuple(
            limb.reshape(len(marks), -1) for limb in _sum_rows(marks, axes, zero)
        )
    # ... and one so short that it is a single stage.
    counts: list[Limbs] = lax.platform_dependent(
        marks,
        cpu=lambda ms: [_sum(_sum_groups(m, axes), axes, m.shape) for m in ms],
        default=lambda ms: [_sum(m, axes, m.shape) for m in ms],
    )
    return tuple(
        jnp.stack([_flat(c) for c in limb]) for limb in zip(*counts, strict=True)
    )


def _sum_rows(marks: list[jax.Array], axes: tuple[int, ...], zero: jax.Array) -> Limbs:
    """Sums along the last axis, of all arrays in one kernel, and then along the others.

    A row along the last axis is summed by one thread.
    """
    shape, first = marks[0].shape, min(axes)
    # Parts of an array, too, where there are few.
    parts = min(STREAMS, max(1, _OPERANDS // len(marks))) if len(axes) > 1 else 1
    parts = math.gcd(parts, shape[first])
    rows = [m.astype(jnp.uint32) for m in marks]
    if parts > 1:
        rows = [part for row in rows for part in jnp.split(row, parts, axis=first)]
    lone = len(rows) == 1
    if lone:
        rows.append(jnp.broadcast_to(zero.astype(jnp.uint32), shape))
    counts = sum_together(rows, (len(shape) - 1,))
    if lone:
        counts = [counts[0] + counts[1]]
    table = jnp.concatenate(counts).reshape(len(marks), parts, *counts[0].shape, 1)
    sizes = (len(marks), parts, *rows[0].shape)
    return _sum(table, (1, *(2 + a for a in axes)), sizes)


def sum_together(arrays: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Sums of arrays of one shape and dtype along the axes, by one reduction."""
    zeros = [np.zeros((), arrays[0].dtype)] * len(arrays)
    sums: list[jax.Array] = lax.reduce(arrays, zeros, _add, axes)
    return sums


def _add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
    return list(map(lax.add, a, b))


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


def reaches(a: Limbs, b: Limbs) -> jax.Array:
    """Whether a is b or more."""
    return a[0] >= b[0] if len(a) == 1 else ~less(a, b)


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


def to_float(a: Limbs) -> jax.Array:
    """Nearest float32, for estimates."""
    value = a[-1].astype(jnp.float32)
    for limb in a[:-1]:
        value = value + limb.astype(jnp.float32) * np.float32(2.0**32)
    return value


def _flat(x: jax.Array) -> jax.Array:
    """A vector of the entries, also where a mesh axis of Explicit type splits them."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.explicit_axes:
        x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))
    return x.reshape(-1)
