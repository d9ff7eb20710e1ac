"""The last candidates for a threshold, gathered in one pass instead of many counts."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mofo_jax.ranking import Axes, order_bits

# XLA on the CPU leaves a reduction over at most 32 entries whole, and unrolls it.
_GROUP = 32


class Gathered(NamedTuple):
    """What is known of the magnitudes of each block up to its bracket's upper end.

    Of each group of entries only the largest such magnitude is seen. If as many are
    seen in the bracket as were counted, these are all.

    Attributes:
      value: the needed largest; of those seen where some are hidden, at the same rank
        from the top in proportion.
      top: the largest.
      seen: uint32, how many were seen in the bracket.
      reached: uint32, how many of them reach value; 0 if nothing was gathered.
      exceeded: uint32, how many exceed it.
    """

    value: jax.Array
    top: jax.Array
    seen: jax.Array
    reached: jax.Array
    exceeded: jax.Array


def most_candidates(shape: tuple[int, ...], axes: Axes) -> int:
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
    r, c = arrays[0].shape[-2:]
    blocks = low.shape[0] // len(arrays)
    groups = []
    for i, x in enumerate(arrays):
        bits = order_bits(x)
        top = high[i * blocks : (i + 1) * blocks].astype(bits.dtype)
        below = bits <= top.reshape(*x.shape[:-2], 1, 1)
        marked = jnp.where(below, bits, np.array(-1, bits.dtype))
        largest = jnp.max(marked.reshape(-1, _GROUP, c), axis=1)
        groups.append(largest.reshape(blocks, r // _GROUP, c))
    largest = jnp.concatenate(groups).astype(low.dtype)

    def count(*thresholds: jax.Array) -> list[jax.Array]:
        marks = [(largest >= t[:, None, None]).astype(jnp.uint32) for t in thresholds]
        for axis in (2, 1):  # of several operands, as in counting
            marks = lax.reduce(
                marks,
                [jnp.uint32(0)] * len(marks),
                lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
                (axis,),
            )
        return list(marks)

    # Both counts are used: XLA would drop one that is not, and split the reduction.
    seen = jnp.maximum(*count(low, low + 1))
    share = seen.astype(jnp.float32) / candidates.astype(jnp.float32)
    rank = jnp.ceil(need.astype(jnp.float32) * share).astype(jnp.uint32)
    need = jnp.where(seen == candidates, need, jnp.clip(rank, 1, seen))

    def narrow(carry: Any) -> Any:
        low, high = carry
        third = jnp.maximum((high - low) // 3, 1)
        first = low + third
        second = jnp.minimum(first + third, high)
        for probe, found in zip((first, second), count(first, second), strict=True):
            enough = found >= need
            low = jnp.where(enough & (probe <= high), jnp.maximum(low, probe), low)
            high = jnp.where(
                ~enough & (probe > low), jnp.minimum(high, probe - 1), high
            )
        return low, high

    value, _ = lax.while_loop(lambda c: jnp.any(c[0] < c[1]), narrow, (low, high))
    reached, exceeded = count(value, value + 1)
    return Gathered(value, jnp.max(largest, axis=(1, 2)), seen, reached, exceeded)
