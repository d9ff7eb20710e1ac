"""Kernels that XLA compiles well, and fast, for a single CPU device."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mofo_jax._selection.counting import Integers, count, limbs_for, sum_exactly
from mofo_jax._selection.groups import slices
from mofo_jax._selection.ranking import Axes, order_bits

# From how many places memory is read at once: a core needs some to read it as fast as
# it can.
_STREAMS = 4

# With more operands than some ten, XLA on the CPU writes out what a reduction reads.
_OPERANDS = 8

# XLA on the CPU leaves a reduction over at most 32 entries whole, and unrolls it.
_GROUP = 32

# How many slices one kernel makes: the time to compile it grows faster than they do.
_SLICES = 32


def rows_of_blocks(x: jax.Array, block_axes: Axes) -> jax.Array:
    """x with each block as rows, for threads to share, of a length for vector units.

    Without a copy; x itself where that cannot be, or a block needs two digits.
    """
    lead = len(block_axes)
    n = math.prod(x.shape[lead:])
    if block_axes != tuple(range(lead)) or limbs_for(n) > 1:
        return x
    rows = math.gcd(n, 1024)
    while rows > 1 and n // rows < 512:
        rows //= 2
    return x.reshape(*x.shape[:lead], rows, n // rows)


def stacked(xs: list[jax.Array]) -> list[jax.Array]:
    """Few arrays of several each: what XLA fuses with their reduction is not a copy."""
    size = max(1, len(xs) // _STREAMS)
    return [jnp.stack(xs[i : i + size]) for i in range(0, len(xs), size)]


def split(table: jax.Array, widths: list[int]) -> list[jax.Array]:
    """As :func:`.groups.slices`, with one kernel for all parts of a width.

    XLA on the CPU compiles a kernel for every slice at another offset, and for all
    that it fuses with it.
    """
    if len(widths) > _SLICES:
        runs = [widths[i : i + _SLICES] for i in range(0, len(widths), _SLICES)]
        parts = split(table, [sum(run) for run in runs])
        return [s for p, run in zip(parts, runs, strict=True) for s in split(p, run)]
    # Sums with zeros, as XLA does not fuse a reduction of several operands with what
    # reads it, and takes one of a single entry for what it is.
    padded = jnp.stack([table, jnp.zeros_like(table)])
    parts = slices(padded, widths)
    for width in set(widths):
        places = [i for i, w in enumerate(widths) if w == width]
        # Numbers rather than vectors of one: XLA moves reshapes to and fro.
        along = (0, 1) if parts[places[0]].shape == (2, 1) else (0,)
        sums = _sum_together([parts[i] for i in places], along)
        for i, part in zip(places, sums, strict=True):
            parts[i] = part
    return parts


def count_rows(marks: list[jax.Array], axes: Axes, zero: jax.Array) -> Integers:
    """As :func:`.counting.count`, row by row, of all arrays in one kernel.

    A row along the last axis is summed by one thread. ``zero`` is an int32 scalar of
    value 0 that the compiler cannot know to be 0.
    """
    shape, first, last = marks[0].shape, min(axes), marks[0].ndim - 1
    if last not in axes or limbs_for(shape[last]) > 1:
        return count(marks, axes)
    # On the CPU, XLA splits a long reduction into stages and writes out what the
    # first one reads. It leaves one of several operands whole, if all of them matter.
    # They are parts of an array, too, where there are few arrays.
    parts = min(_STREAMS, max(1, _OPERANDS // len(marks))) if len(axes) > 1 else 1
    parts = math.gcd(parts, shape[first])
    rows = [m.astype(jnp.uint32) for m in marks]
    if parts > 1:
        rows = [part for row in rows for part in jnp.split(row, parts, axis=first)]
    lone = len(rows) == 1
    if lone:
        rows.append(jnp.broadcast_to(zero.astype(jnp.uint32), shape))
    counts = _sum_together(rows, (last,))
    if lone:
        counts = [counts[0] + counts[1]]
    table = jnp.concatenate(counts).reshape(len(marks), parts, *counts[0].shape, 1)
    sizes = (len(marks), parts, *rows[0].shape)
    total = sum_exactly(table, (1, *(2 + a for a in axes)), sizes)
    return Integers(tuple(limb.reshape(len(marks), -1) for limb in total.limbs))


def _sum_together(arrays: list[jax.Array], axes: Axes) -> list[jax.Array]:
    """Sums of arrays of one shape and dtype along the axes, by one reduction."""
    zeros = [np.zeros((), arrays[0].dtype)] * len(arrays)
    add = lambda a, b: list(map(lax.add, a, b))
    sums: list[jax.Array] = lax.reduce(arrays, zeros, add, axes)
    return sums


class Gathered(NamedTuple):
    """What is known of the magnitudes of each block up to its bracket's upper end.

    Of each group of entries only the largest such magnitude is seen. If as many are
    seen in the bracket as were counted, these are all.

    Attributes:
      value: the needed largest; of those seen where some are hidden, at the same rank
        from the top in proportion.
      seen: uint32, how many were seen in the bracket.
      reached: uint32, how many of them reach value; 0 if nothing was gathered.
      exceeded: uint32, how many exceed it.
    """

    value: jax.Array
    seen: jax.Array
    reached: jax.Array
    exceeded: jax.Array


def gather_limit(shape: tuple[int, ...], axes: Axes) -> int:
    """How many candidates in a block rarely hide each other; 0 if it has no groups."""
    if axes != (len(shape) - 2, len(shape) - 1) or shape[-2] % _GROUP:
        return 0
    return math.isqrt(shape[-2] * shape[-1] // _GROUP)


def gather(
    arrays: list[jax.Array],
    low: jax.Array,
    high: jax.Array,
    need: jax.Array,
    candidates: jax.Array,
) -> Gathered:
    """Looks at the magnitudes from low to high, of arrays of one shape ``[..., r, c]``.

    Args:
      arrays: Arrays whose last two axes are a block's.
      low: Lower end of the bracket of each block of all arrays, in a vector.
      high: Upper end.
      need: Which largest magnitude is wanted, from 1, as uint32.
      candidates: How many entries the bracket has, as uint32.
    """
    tops = high.reshape(len(arrays), -1)
    nearest = jnp.concatenate(
        [_nearest(x, top) for x, top in zip(arrays, tops, strict=True)]
    )
    kind = nearest.dtype

    def count_within(distance: jax.Array) -> jax.Array:
        marks = nearest <= distance[:, None, None]
        zero = (low[0] < 0).astype(jnp.int32)
        # One limb: blocks with more entries have no groups.
        (found,) = count_rows([marks], (1, 2), zero).limbs
        return found[0]

    span = (high - low).astype(kind)
    seen = count_within(span)
    share = seen.astype(jnp.float32) / candidates.astype(jnp.float32)
    rank = jnp.ceil(need.astype(jnp.float32) * share).astype(jnp.uint32)
    need = lax.select(seen == candidates, need, jnp.minimum(jnp.maximum(rank, 1), seen))

    # The shortest distance from the top within which the needed number is, by steps of
    # halving size. Those too short grow, so that the last of them is one less.
    def approach(carry: Any) -> Any:
        found, reached, exceeded, step = carry
        probe = found - jnp.minimum(step, found)
        number = count_within(probe)
        enough = number >= need
        return (
            lax.select(enough, probe, found),
            lax.select(enough, number, reached),
            lax.select(enough, exceeded, number),
            step >> np.array(1, kind),
        )

    widest = jnp.maximum(jnp.max(span), 1)
    exponent = np.array(8 * kind.itemsize - 1, kind) - lax.clz(widest)
    carry = (span, seen, jnp.zeros_like(seen), jnp.ones_like(widest) << exponent)
    found, reached, exceeded, _ = lax.while_loop(lambda c: c[-1] > 0, approach, carry)
    value = high - found.astype(high.dtype)
    return Gathered(value, seen, reached, exceeded)


def _nearest(x: jax.Array, top: jax.Array) -> jax.Array:
    """How far below the top is the nearest of each group: ``[blocks, groups, c]``.

    In unsigned integers, so that what is above the top is the farthest from it.
    """
    *lead, r, c = x.shape
    bits = order_bits(x)
    top = top.astype(bits.dtype).reshape(lead)
    distance = lax.broadcast_in_dim(top, x.shape, tuple(range(len(lead)))) - bits
    unsigned = np.dtype(f"uint{8 * bits.dtype.itemsize}")
    distance = lax.bitcast_convert_type(distance, unsigned)
    return jnp.min(distance.reshape(-1, r // _GROUP, _GROUP, c), axis=2)
