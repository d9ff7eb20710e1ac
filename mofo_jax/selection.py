"""Exact top-fraction masks of arrays. Knows nothing of optimizers.

The mask of the k largest magnitudes of a block is found by counting, not by
sorting: magnitudes are read as integers (the bit pattern of a non-negative float
is ordered as the float is), and the k-th largest is searched for bit by bit, each
step one pass that counts the entries at or above a candidate. Only counts cross
devices, so the result is that of the global array whatever its sharding.
"""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mofo_jax import counting
from mofo_jax.checks import (
    BlockAxes,
    Method,
    at_least_float32,
    check_alpha,
    check_method,
    is_rankable,
    normalize_block_axes,
)


def top_fraction_mask(
    x: jax.Array,
    alpha: jax.typing.ArrayLike,
    *,
    block_axes: BlockAxes = None,
    method: Method = "search",
) -> jax.Array:
    """Marks the ``alpha`` fraction of entries with the largest magnitude.

    In every block of n entries exactly ``k = min(n, max(1, floor(alpha * n)))`` are
    marked. Entries are ranked by ``|x|``, NaN above infinity; of equal entries those
    with the lower flat (row-major) index inside the block come first. This is bit
    for bit the mask that :func:`jax.lax.top_k` of the flattened magnitudes gives
    (except that top_k takes bfloat16 subnormals for zero on the CPU).

    The product ``alpha * n`` is rounded in alpha's precision: float64 for a Python
    number, its own dtype (float32 at least) for an array. A traced alpha cannot be
    checked; below the range it selects one entry a block (NaN too), above it all.

    Args:
      x: Real floating or complex array of any shape. A scalar is always marked.
      alpha: Fraction in (0, 1], a Python number or a scalar array (also traced).
      block_axes: Axes along which every index is a block of its own: of a
        ``[layers, d, f]`` array with ``block_axes=0`` every layer selects for itself.
        None makes the whole array one block.
      method: ``"search"`` counts; it needs no temporary memory of x's size (but for
        complex x), runs on sharded arrays and moves only counts between devices.
        ``"top_k"`` is the reference by :func:`jax.lax.top_k`, which sorts, gathers
        a sharded array, and does not run on mesh axes of Explicit type.

    Returns:
      Boolean array of x's shape.

    Raises:
      TypeError: x is not complex or floating of 16 bits or more, alpha is not a
        number, or block_axes are not integers.
      ValueError: alpha is outside (0, 1], a block axis is out of range or repeated,
        or the method is unknown.

    >>> import jax.numpy as jnp
    >>> from mofo_jax import top_fraction_mask
    >>> top_fraction_mask(jnp.array([1.0, -3.0, 2.0, 2.0]), 0.5)
    Array([False,  True,  True, False], dtype=bool)
    """
    check_alpha(alpha)
    x = jnp.asarray(x)
    if not is_rankable(x.dtype):
        raise TypeError(
            "x must be a floating (of 16 bits or more) or complex array, got dtype "
            f"{x.dtype.name}"
        )
    check_method(method)
    return select_mask(x, alpha, normalize_block_axes(block_axes, x.shape), method)


def select_mask(
    x: jax.Array, alpha: jax.typing.ArrayLike, block_axes: tuple[int, ...], method: str
) -> jax.Array:
    """:func:`top_fraction_mask` of arguments already checked.

    A signed integer array is taken as magnitudes already.
    """
    axes = tuple(a for a in range(x.ndim) if a not in block_axes)
    n = math.prod(x.shape[a] for a in axes)
    k = _static_k(alpha, n)
    if x.size == 0 or n == 1 or k == n:
        return jnp.ones_like(x, dtype=bool)
    if jnp.iscomplexobj(x):
        x = jnp.abs(x)  # once: a root recomputed in every pass may round differently
    if method == "top_k":
        return _top_k_mask(x, alpha, n, block_axes + axes)
    mask: jax.Array = _search_mask(x, k, None if k else alpha, axes)
    return mask


# Compiled once for each shape: without jit, eager loops compile at every call; and
# the many leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnames=("static_k", "axes"))
def _search_mask(
    x: jax.Array,
    static_k: int | None,
    alpha: jax.Array | None,
    axes: tuple[int, ...],
) -> jax.Array:
    n = math.prod(x.shape[a] for a in axes)
    k = _k_limbs(static_k, alpha, n)
    threshold, reached = _search_threshold(x, k, axes)
    cut = _search_cut(x, threshold, counting.subtract(reached, k), axes)
    bits = _order_bits(x)
    before_cut = counting.less(_block_index(x.shape, axes)[0], cut)
    return (bits > threshold) | ((bits == threshold) & before_cut)


def _search_threshold(
    x: jax.Array, k: counting.Limbs, axes: tuple[int, ...]
) -> tuple[jax.Array, counting.Limbs]:
    """A threshold in bits per block that at least k entries reach, and how many do.

    Either exactly k entries reach it, or it is the k-th largest value.
    """

    def unfinished(carry: Any) -> jax.Array:
        low, high, reached = carry
        return jnp.any((low < high) & ~counting.equal(reached, k))

    def step(carry: Any) -> Any:
        # The barrier ties x to the loop's variables. Without it XLA hoists |x| out
        # of the loop, which keeps a copy of x's size alive.
        (low, high, reached), y = lax.optimization_barrier((carry, x))
        middle = high - (high - low) // 2
        count = counting.count(_order_bits(y) >= middle, axes)
        enough = ~counting.less(count, k)
        # A block that has finished stays as it is while others go on.
        moves = (low < high) & ~counting.equal(reached, k)
        low = jnp.where(moves & enough, middle, low)
        high = jnp.where(moves & ~enough, middle - 1, high)
        return low, high, counting.where(moves & enough, count, reached)

    # At least k entries reach low, and fewer than k exceed high. A loop's carry must
    # keep its sharding and mesh axes of variation, so it starts from zeros made of x,
    # which XLA turns into constants.
    low = jnp.max(_order_bits(x), axis=axes, keepdims=True) & 0
    high = low + np.iinfo(low.dtype).max
    n = counting.limbs(math.prod(x.shape[a] for a in axes), len(k))
    reached = tuple(low.astype(jnp.uint32) + limb for limb in n)
    low, _, reached = lax.while_loop(unfinished, step, (low, high, reached))
    return low, reached


def _search_cut(
    x: jax.Array,
    threshold: jax.Array,
    surplus: counting.Limbs,
    axes: tuple[int, ...],
) -> counting.Limbs:
    """The index in each block from which on entries equal to threshold are surplus.

    Found bit by bit as the largest index with at least ``surplus`` ties from there
    on. A cumulative sum would do it in one pass, but gathers a sharded array.
    """
    none = tuple(jnp.zeros_like(s) for s in surplus)
    _, widths = _block_index(x.shape, axes)
    offsets = [sum(widths[i + 1 :]) for i in range(len(widths))]

    def unfinished(carry: Any) -> jax.Array:
        position, _, ties = carry
        going_on: jax.Array = (position >= 0) & jnp.any(~counting.equal(ties, surplus))
        return going_on

    def step(carry: Any) -> Any:
        position, cut, ties = carry
        cut, y, zero = lax.optimization_barrier((cut, x, jnp.uint32(0)))
        candidate = tuple(
            c | counting.bit(position - offset, width)
            for c, offset, width in zip(cut, offsets, widths, strict=True)
        )
        index, _ = _block_index(x.shape, axes, zero)
        marks = (_order_bits(y) == threshold) & ~counting.less(index, candidate)
        count = counting.count(marks, axes)
        take = ~counting.equal(ties, surplus) & ~counting.less(count, surplus)
        return (
            position - 1,
            counting.where(take, candidate, cut),
            counting.where(take, count, ties),
        )

    # Blocks without surplus start finished, with a cut beyond every index.
    nothing = counting.equal(surplus, none)
    beyond = jnp.where(nothing, ~jnp.uint32(0), jnp.uint32(0))
    cut = tuple(beyond for _ in widths)
    ties = counting.where(nothing, none, tuple(~s for s in none))
    start = (jnp.int32(sum(widths) - 1), cut, ties)
    _, cut, _ = lax.while_loop(unfinished, step, start)
    return cut


def _top_k_mask(
    x: jax.Array, alpha: jax.typing.ArrayLike, n: int, order: tuple[int, ...]
) -> jax.Array:
    """The mask by :func:`jax.lax.top_k`; ``order`` names the block axes first."""
    # Of the bits, because XLA's top_k takes bfloat16 subnormals for zero on the CPU.
    rows = _order_bits(x).transpose(order).reshape(-1, n)
    k = _static_k(alpha, n)
    _, columns = lax.top_k(rows, n if k is None else k)
    ranks = jnp.arange(columns.shape[1], dtype=jnp.uint32)
    below_k = counting.less((ranks,), _k_limbs(k, alpha, n)[-1:])
    chosen = jnp.broadcast_to(below_k, columns.shape)
    mask = jnp.zeros(rows.shape, bool)
    mask = mask.at[jnp.arange(rows.shape[0])[:, None], columns].set(chosen)
    shape = tuple(x.shape[a] for a in order)
    return mask.reshape(shape).transpose(tuple(np.argsort(order).tolist()))


def _order_bits(x: jax.Array) -> jax.Array:
    """Magnitudes as non-negative signed integers of the same order.

    Integers compare subnormals, infinities and NaN exactly, where a float comparison
    may flush the first and loses the last. Signed, because every magnitude has a
    clear top bit and vector units compare signed integers faster.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x
    kind = np.dtype(f"int{8 * x.dtype.itemsize}")
    return lax.bitcast_convert_type(x, kind) & np.array(np.iinfo(kind).max, kind)


def _static_k(alpha: jax.typing.ArrayLike, n: int) -> int | None:
    """k for a block of n entries, or None for an alpha that is an array."""
    if not isinstance(alpha, numbers.Real):
        return None
    return min(n, max(1, math.floor(float(alpha) * n)))


def _k_limbs(
    static_k: int | None, alpha: jax.typing.ArrayLike | None, n: int
) -> counting.Limbs:
    """k for a block of n entries, with as many limbs as a count of n has."""
    limbs = 1 if n < counting.LIMB_SIZE else 2
    if static_k is not None:
        return counting.limbs(static_k, limbs)
    alpha = at_least_float32(jnp.asarray(alpha))
    product = jnp.floor(alpha * np.array(n, alpha.dtype))
    product = jnp.where(product >= 1, product, 1)  # NaN, too, becomes 1
    parts = (jnp.floor(product / 2.0**32), product % 2.0**32)[2 - limbs :]
    some = tuple(part.astype(jnp.uint32) for part in parts)
    everything = counting.limbs(n, limbs)
    # n may not be representable in alpha's dtype, so alpha = 1 is a case of its own.
    return counting.where(
        (alpha >= 1) | ~counting.less(some, everything), everything, some
    )


def _block_index(
    shape: tuple[int, ...], axes: tuple[int, ...], zero: jax.Array | None = None
) -> tuple[counting.Limbs, tuple[int, ...]]:
    """Row-major index of each entry inside its block, and each limb's width in bits.

    A limb is the index over a run of axes of less than LIMB_SIZE entries. In a loop,
    a ``zero`` that depends on its variables keeps XLA from storing the index.
    """
    zero = jnp.uint32(0) if zero is None else zero
    index: list[jax.Array] = []
    widths: list[int] = []
    remaining = list(axes)
    while remaining:
        size, limb = 1, zero
        while remaining and size * shape[remaining[-1]] < counting.LIMB_SIZE:
            axis = remaining.pop()
            reduced = tuple(d if a in axes else 1 for a, d in enumerate(shape))
            iota = lax.broadcasted_iota(jnp.uint32, reduced, axis)
            limb = limb + np.uint32(size) * iota
            size *= shape[axis]
        index.insert(0, limb)
        widths.insert(0, (size - 1).bit_length())
    return tuple(index), tuple(widths)
