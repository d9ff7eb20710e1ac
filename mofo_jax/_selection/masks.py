"""Exact top-fraction masks of arrays. Knows nothing of optimizers.

The mask of the k largest magnitudes of a block is found by counting, not by
sorting: a threshold that exactly k entries reach is searched for by passes that count
the entries at or above a candidate. Only counts cross devices, so the result is that
of the global array whatever its sharding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mofo_jax._checks import (
    BlockAxes,
    Method,
    check_alpha,
    check_method,
    is_rankable,
    normalize_block_axes,
)
from mofo_jax._selection import counting
from mofo_jax._selection.brackets import vary, varying_axes
from mofo_jax._selection.candidates import Gathered, most_candidates
from mofo_jax._selection.fraction import k_limbs, static, static_k
from mofo_jax._selection.ranking import (
    block_count,
    describe,
    extent,
    index_digits,
    order_bits,
    reaches,
    rows_of_blocks,
)
from mofo_jax._selection.search import Request, search
from mofo_jax._selection.units import look_at, make_units, slices, split


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
    axes = normalize_block_axes(block_axes, x.shape)
    (mask,), _ = select_masks([x], alpha, [axes], method)
    return mask


def select_masks(
    arrays: list[jax.Array],
    alpha: jax.typing.ArrayLike,
    block_axes: list[tuple[int, ...]],
    method: str = "search",
    guess: jax.Array | None = None,
) -> tuple[list[jax.Array], jax.Array]:
    """:func:`top_fraction_mask` of several arrays, of arguments already checked.

    Args:
      arrays: Real floating or complex arrays; signed integers are magnitudes already.
      alpha: As there.
      block_axes: For each array, its normalized block axes.
      method: As there.
      guess: What the last call returned for arrays like these, or :func:`no_guess`.
        It decides how long the search takes, never its result.

    Returns:
      Boolean masks, and an int32 vector with a number for each block: the upper 32
      bits of a magnitude that those selected reach, -1 where none was searched for.
    """
    if guess is None:
        guess = no_guess([x.shape for x in arrays], block_axes)
    sizes = [block_count(x.shape, a) for x, a in zip(arrays, block_axes, strict=True)]
    stops = np.cumsum(sizes)
    static_alpha = static(alpha)
    masks: list[Any] = [None] * len(arrays)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, x in enumerate(arrays):
        n = x.size // max(sizes[i], 1)
        if n <= 1 or (static_alpha and static_k(static_alpha, n) == n):
            masks[i] = jnp.ones_like(x, dtype=bool)
        elif method == "top_k":
            order = block_axes[i] + extent(x.shape, block_axes[i])
            masks[i] = _top_k_mask(_real(x), alpha, n, order)
        else:
            # What varies along a manual axis of shard_map has a loop of its own, as
            # what it is mixed with would vary too.
            groups.setdefault(varying_axes(x), []).append(i)
    for group in groups.values():
        # Arrays of one kind side by side, see make_units.
        group.sort(key=lambda i: (str(jax.typeof(arrays[i])), block_axes[i]))
        places = np.concatenate(
            [np.arange(stops[i] - sizes[i], stops[i]) for i in group]
        )
        found, values = _search_masks(
            tuple(_real(arrays[i]) for i in group),
            guess[places],
            None if static_alpha else alpha,
            static_alpha,
            tuple(block_axes[i] for i in group),
        )
        guess = guess.at[places].set(values)
        for i, mask in zip(group, found, strict=True):
            masks[i] = mask
    return masks, guess


def no_guess(
    shapes: list[tuple[int, ...]], block_axes: list[tuple[int, ...]]
) -> jax.Array:
    """What :func:`select_masks` starts from where nothing is known."""
    blocks = sum(block_count(s, a) for s, a in zip(shapes, block_axes, strict=True))
    return jnp.full((blocks,), -1, jnp.int32)


# Compiled once for each tree of shapes: without jit, eager loops compile at every call.
@functools.partial(jax.jit, static_argnames=("static_alpha", "block_axes"))
def _search_masks(
    arrays: tuple[jax.Array, ...],
    guess: jax.Array,
    alpha: jax.Array | None,
    static_alpha: float | None,
    block_axes: tuple[tuple[int, ...], ...],
) -> tuple[list[jax.Array], jax.Array]:
    """Masks of the arrays, and their blocks' thresholds; arrays of one kind adjoin."""
    paired = list(zip(arrays, block_axes, strict=True))
    alone = counting.on_one_cpu_device()
    views = [rows_of_blocks(x, a) if alone else x for x, a in paired]
    axes = [extent(v.shape, a) for v, a in zip(views, block_axes, strict=True)]
    few = [
        alone and most_candidates(v.shape, a) for v, a in zip(views, axes, strict=True)
    ]
    blocks = describe(views, axes, few)
    k = k_limbs(static_alpha, alpha, blocks.n)
    digits = len(blocks.sizes)
    widths = [block_count(x.shape, a) for x, a in paired]
    units = make_units([(x.shape, x.dtype, a) for x, a in paired])
    unit_widths = [sum(widths[i] for i in unit) for unit in units]
    # Elsewhere kernels that are compiled one by one cost less than such a reduction.
    apart = split if alone else slices

    def pack(request: Request) -> jax.Array:
        (value, cut), mode, *bracket = request
        rows = [value, *cut, *(mode, *bracket) * alone]
        rows = [jnp.broadcast_to(row.astype(guess.dtype), value.shape) for row in rows]
        return jnp.stack(rows)

    def look(packed: jax.Array) -> tuple[counting.Limbs, Gathered | None]:
        xs = views
        if not alone:
            # The barrier ties the arrays to the loop's variables. Without it XLA hoists
            # their magnitudes out of the loop, which keeps a copy of all of them alive.
            packed, xs = lax.optimization_barrier((packed, views))
        answers = [
            look_at(
                [xs[i] for i in unit],
                part,
                axes[unit[0]],
                digits,
                len(k),
                alone,
                few[unit[0]] > 0,
            )
            for unit, part in zip(units, apart(packed, unit_widths), strict=True)
        ]
        answer = jnp.concatenate(answers, axis=-1)
        counts = tuple(answer[: len(k)].astype(jnp.uint32))
        if not alone:
            return counts, None
        value, *numbers = answer[len(k) :, :1]
        return counts, Gathered(value, *(n.astype(jnp.uint32) for n in numbers))

    guess = vary(guess, varying_axes(arrays[0]))[None]
    if blocks.top.dtype == np.int64:
        guess = guess.astype(np.int64) << 32
    packed = search(look, pack, blocks, k, guess, 2 if alone else 4)
    thresholds = zip(
        *(apart(row, widths) for row in packed[: 1 + digits, 0]), strict=True
    )
    masks = []
    shared: dict[Any, counting.Limbs] = {}
    for x, along, threshold in zip(arrays, block_axes, thresholds, strict=True):
        kind = x.shape, extent(x.shape, along)
        if not (alone and kind in shared):  # as in look_at
            shared[kind] = index_digits(*kind)
        masks.append(reaches(x, threshold, shared[kind], kind[1]))
    values = packed[0, 0]
    values = values >> 32 if values.dtype == np.int64 else values
    return masks, values.astype(jnp.int32)


def _top_k_mask(
    x: jax.Array, alpha: jax.typing.ArrayLike, n: int, order: tuple[int, ...]
) -> jax.Array:
    """The mask by :func:`jax.lax.top_k`; ``order`` names the block axes first."""
    # Of the bits, because XLA's top_k takes bfloat16 subnormals for zero on the CPU.
    rows = order_bits(x).transpose(order).reshape(-1, n)
    static_alpha = static(alpha)
    _, columns = lax.top_k(rows, static_k(static_alpha, n) if static_alpha else n)
    ranks = jnp.arange(columns.shape[1], dtype=jnp.uint32)
    below_k = counting.less((ranks[None],), k_limbs(static_alpha, alpha, [n])[-1:])
    chosen = jnp.broadcast_to(below_k, columns.shape)
    mask = jnp.zeros(rows.shape, bool)
    mask = mask.at[jnp.arange(rows.shape[0])[:, None], columns].set(chosen)
    shape = tuple(x.shape[a] for a in order)
    return mask.reshape(shape).transpose(tuple(np.argsort(order).tolist()))


def _real(x: jax.Array) -> jax.Array:
    """Magnitudes of complex numbers, once: a root taken again may round differently."""
    return jnp.abs(x) if jnp.iscomplexobj(x) else x
