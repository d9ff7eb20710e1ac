"""Exact top-fraction masks of arrays. Knows nothing of optimizers.

The mask of the k largest magnitudes of a block is found by counting, not by
sorting: see :mod:`.search`. Only counts cross devices, so the result is that of the
global array whatever its sharding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mofo_jax._checks import (
    BlockAxes,
    Method,
    check_alpha,
    check_method,
    is_rankable,
    normalize_block_axes,
)
from mofo_jax._selection.brackets import varying_axes
from mofo_jax._selection.fraction import Fraction
from mofo_jax._selection.ranking import block_count
from mofo_jax._selection.search import search_masks
from mofo_jax._selection.top_k import top_k_mask


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
    fraction = Fraction.of(alpha)
    sizes = [block_count(x.shape, a) for x, a in zip(arrays, block_axes, strict=True)]
    stops = np.cumsum(sizes)
    masks: list[Any] = [None] * len(arrays)
    searches: dict[tuple[str, ...], list[int]] = {}
    for i, x in enumerate(arrays):
        n = x.size // max(sizes[i], 1)
        if n <= 1 or fraction.known_k(n) == n:
            masks[i] = jnp.ones_like(x, dtype=bool)
        elif method == "top_k":
            most, k = fraction.known_k(n) or n, fraction.k([n])
            masks[i] = top_k_mask(_real(x), k, most, block_axes[i])
        else:
            # What varies along a manual axis of shard_map has a loop of its own, as
            # what it is mixed with would vary too.
            searches.setdefault(varying_axes(x), []).append(i)
    for members in searches.values():
        # Arrays of one kind side by side, as groups want them.
        members.sort(key=lambda i: (str(jax.typeof(arrays[i])), block_axes[i]))
        places = np.concatenate(
            [np.arange(stops[i] - sizes[i], stops[i]) for i in members]
        )
        entries = [arrays[i].size // sizes[i] for i in members for _ in range(sizes[i])]
        found, values = search_masks(
            [_real(arrays[i]) for i in members],
            fraction.k(entries),
            guess[places],
            block_axes=tuple(block_axes[i] for i in members),
        )
        guess = guess.at[places].set(values)
        for i, mask in zip(members, found, strict=True):
            masks[i] = mask
    return masks, guess


def no_guess(
    shapes: list[tuple[int, ...]], block_axes: list[tuple[int, ...]]
) -> jax.Array:
    """What :func:`select_masks` starts from where nothing is known."""
    blocks = sum(block_count(s, a) for s, a in zip(shapes, block_axes, strict=True))
    return jnp.full((blocks,), -1, jnp.int32)


def _real(x: jax.Array) -> jax.Array:
    """Magnitudes of complex numbers, once: a root taken again may round differently."""
    return jnp.abs(x) if jnp.iscomplexobj(x) else x
