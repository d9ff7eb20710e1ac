"""The last candidates for a threshold, gathered in one pass instead of many counts."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mofo_jax._selection import counting
from mofo_jax._selection.ranking import Axes, order_bits

# XLA on the CPU leaves a reduction over at most 32 entries whole, and unrolls it.
_GROUP = 32


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
    tops = high.reshape(len(arrays), -1)
    nearest = jnp.concatenate(
        [_nearest(x, top) for x, top in zip(arrays, tops, strict=True)]
    )
    kind = nearest.dtype

    def count(distance: jax.Array) -> jax.Array:
        marks = nearest <= distance[:, None, None]
        zero = (low[0] < 0).astype(jnp.int32)
        # One limb: blocks with more entries have no groups.
        (found,) = counting.count([marks], (1, 2), zero)
        return found[0]

    span = (high - low).astype(kind)
    seen = count(span)
    share = seen.astype(jnp.float32) / candidates.astype(jnp.float32)
    rank = jnp.ceil(need.astype(jnp.float32) * share).astype(jnp.uint32)
    need = lax.select(seen == candidates, need, jnp.minimum(jnp.maximum(rank, 1), seen))

    # The shortest distance from the top within which the needed number is, by steps of
    # halving size. Those too short grow, so that the last of them is one less.
    def approach(carry: Any) -> Any:
        found, reached, exceeded, step = carry
        probe = found - jnp.minimum(step, found)
        number = count(probe)
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
