"""How the entries of an array are ranked: by magnitude, and by index among equals."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mofo_jax._selection.counting import Integers, limbs_for

Axes = tuple[int, ...]


class Blocks(NamedTuple):
    """What the search has to know of the blocks, in arrays ``[1, blocks]``.

    Attributes:
      top: largest magnitude, as the integer that stands for it.
      octave: number of magnitudes between a value and its double.
      sizes: entries along each digit of an index, most significant first, 1 for a
        digit that a block does not have. Their product is the block's size.
      k: how many entries to select, from 1 to the block's size.
    """

    top: np.ndarray
    octave: np.ndarray
    sizes: tuple[np.ndarray, ...]
    k: Integers

    @property
    def n(self) -> Integers:
        """Number of entries."""
        digits = zip(*(sizes[0].tolist() for sizes in self.sizes), strict=True)
        return Integers.of([math.prod(sizes) for sizes in digits], len(self.k.limbs))


# Traced once for each kind of array.
@functools.partial(jax.jit, static_argnames="axes")
def mark(
    x: jax.Array, threshold: tuple[jax.Array, ...], index: Integers | None, axes: Axes
) -> jax.Array:
    """Marks the entries at or above the threshold of their block.

    Args:
      x: Array that :func:`order_bits` takes.
      threshold: A threshold's value and the digits of its cut, integers ``[blocks]``.
      index: The entries' :func:`index_digits`; None where the cut is behind them all.
      axes: The axes of x along which its blocks extend.
    """
    block_axes = tuple(a for a in range(x.ndim) if a not in axes)
    sizes = tuple(x.shape[a] for a in block_axes)
    spread = lambda row, dtype: lax.broadcast_in_dim(
        row.reshape(sizes).astype(dtype), x.shape, block_axes
    )
    bits = order_bits(x)
    value = spread(threshold[0], bits.dtype)
    if index is None:
        return bits >= value
    digits = threshold[-len(index.limbs) :]
    cut = Integers(tuple(spread(row, jnp.int32) for row in digits))
    # The same as bits > value, or bits == value and index < cut, in fewer operations.
    return bits - (index >= cut).astype(bits.dtype) >= value


def order_bits(x: jax.Array) -> jax.Array:
    """Magnitudes as non-negative signed integers of the same order.

    Integers compare subnormals, infinities and NaN exactly, where a float comparison
    may flush the first and loses the last. Signed, because every magnitude has a
    clear top bit and vector units compare signed integers faster. Signed integers are
    magnitudes already.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x
    kind = _bits_dtype(x.dtype)
    return lax.bitcast_convert_type(x, kind) & np.array(np.iinfo(kind).max, kind)


def describe(arrays: list[jax.Array], axes: list[Axes], k: Integers) -> Blocks:
    """The blocks of all arrays, one after the other; axes as :func:`entry_axes`."""
    sizes = [
        [math.prod(x.shape[a] for a in run) for run in _index_runs(x.shape, along)]
        for x, along in zip(arrays, axes, strict=True)
    ]
    digits = max(map(len, sizes))
    rows: list[list[int]] = []
    for x, size in zip(arrays, sizes, strict=True):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        top = int(np.iinfo(_bits_dtype(x.dtype)).max)
        octave = 2 ** int(jnp.finfo(x.dtype).nmant) if is_float else top // 64
        row = [top, octave, *(1,) * (digits - len(size)), *size]
        rows += [row] * (x.size // math.prod(size))
    kind = np.int32 if max(row[0] for row in rows) < 2**31 else np.int64
    top, octave, *columns = np.array(rows, kind).T[:, None]
    return Blocks(top, octave, tuple(columns), k)


def entry_axes(shape: tuple[int, ...], block_axes: Axes) -> Axes:
    """The axes along which the entries of a block lie."""
    return tuple(a for a in range(len(shape)) if a not in block_axes)


def block_count(shape: tuple[int, ...], block_axes: Axes) -> int:
    """How many blocks an array has."""
    return math.prod(shape[a] for a in block_axes)


def _bits_dtype(dtype: Any) -> np.dtype[Any]:
    return np.dtype(f"int{8 * np.dtype(dtype).itemsize}")


def index_digits(
    shape: tuple[int, ...], axes: Axes, zero: jax.Array | None = None
) -> Integers:
    """Row-major index of each entry inside its block; its limbs are int32 digits.

    ``zero`` is, in a loop, an int32 scalar of value 0 that depends on the loop's
    variables, which keeps XLA from storing what the index is made of.
    """
    digits = []
    for run in _index_runs(shape, axes):
        size, digit = 1, zero
        for axis in reversed(run):
            iota = lax.broadcasted_iota(jnp.int32, shape, axis)
            iota = iota if size == 1 else np.int32(size) * iota
            digit = iota if digit is None else digit + iota
            size *= shape[axis]
        assert digit is not None
        digits.append(digit)
    return Integers(tuple(digits))


def _index_runs(shape: tuple[int, ...], axes: Axes) -> list[Axes]:
    """Runs of axes with as many entries as one limb can count, for each digit one."""
    runs: list[Axes] = []
    for axis in reversed(axes):
        if runs and limbs_for(math.prod(shape[a] for a in (axis, *runs[0]))) == 1:
            runs[0] = (axis, *runs[0])
        else:
            runs.insert(0, (axis,))
    return runs
