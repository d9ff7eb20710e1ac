"""How the entries of an array are ranked: by magnitude, and by index among equals."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mofo_jax._selection import counting

Axes = tuple[int, ...]


class Blocks(NamedTuple):
    """What the search has to know of the blocks, as NumPy arrays ``[1, blocks]``.

    Attributes:
      top: largest magnitude, as the integer that stands for it.
      octave: number of magnitudes between a value and its double.
      sizes: entries along each digit of an index, most significant first, 1 for a
        digit that a block does not have. Their product is the block's size.
      few: how many candidates are worth gathering, 0 for a block that cannot be.
    """

    top: np.ndarray
    octave: np.ndarray
    few: np.ndarray
    sizes: tuple[np.ndarray, ...]

    @property
    def n(self) -> list[int]:
        """Number of entries, as exact integers."""
        digits = zip(*(sizes[0].tolist() for sizes in self.sizes), strict=True)
        return [math.prod(sizes) for sizes in digits]


# Traced once for each kind of array.
@functools.partial(jax.jit, static_argnames="axes")
def reaches(
    x: jax.Array, threshold: tuple[jax.Array, ...], index: counting.Limbs, axes: Axes
) -> jax.Array:
    """Marks the entries at or above a threshold of their block.

    Args:
      x: Array that :func:`order_bits` takes.
      threshold: A threshold's value and the digits of its cut, integers ``[blocks]``.
      index: The entries' :func:`index_digits`.
      axes: The axes of x along which its blocks extend.
    """
    block_axes = tuple(a for a in range(x.ndim) if a not in axes)
    sizes = tuple(x.shape[a] for a in block_axes)
    spread = lambda row, dtype: lax.broadcast_in_dim(
        row.reshape(sizes).astype(dtype), x.shape, block_axes
    )
    bits = order_bits(x)
    value = spread(threshold[0], bits.dtype)
    cut = tuple(spread(row, jnp.int32) for row in threshold[-len(index) :])
    # The same as bits > value, or bits == value and index < cut, in fewer operations.
    return bits - counting.reaches(index, cut).astype(bits.dtype) >= value


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


def rows_of_blocks(x: jax.Array, block_axes: Axes) -> jax.Array:
    """x with each block as rows, for threads to share, of a length for vector units.

    Without a copy; x itself where that cannot be, or a block needs two digits.
    """
    lead = len(block_axes)
    n = math.prod(x.shape[lead:])
    if block_axes != tuple(range(lead)) or n >= counting.LIMB_SIZE:
        return x
    rows = math.gcd(n, 1024)
    while rows > 1 and n // rows < 512:
        rows //= 2
    return x.reshape(*x.shape[:lead], rows, n // rows)


def describe(arrays: list[jax.Array], axes: list[Axes], few: list[int]) -> Blocks:
    """The blocks of all arrays, one after the other; ``few`` is for each array."""
    sizes = [
        [math.prod(x.shape[a] for a in run) for run in _index_runs(x.shape, extent)]
        for x, extent in zip(arrays, axes, strict=True)
    ]
    digits = max(map(len, sizes))
    rows: list[list[int]] = []
    for x, size, some in zip(arrays, sizes, few, strict=True):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        top = int(np.iinfo(_bits_dtype(x.dtype)).max)
        octave = 2 ** int(jnp.finfo(x.dtype).nmant) if is_float else top // 64
        row = [top, octave, some, *(1,) * (digits - len(size)), *size]
        rows += [row] * (x.size // math.prod(size))
    kind = np.int32 if max(row[0] for row in rows) < 2**31 else np.int64
    top, octave, few_, *columns = np.array(rows, kind).T[:, None]
    return Blocks(top, octave, few_, tuple(columns))


def extent(shape: tuple[int, ...], block_axes: Axes) -> Axes:
    """The axes along which the blocks of an array extend."""
    return tuple(a for a in range(len(shape)) if a not in block_axes)


def block_count(shape: tuple[int, ...], block_axes: Axes) -> int:
    """How many blocks an array has."""
    return math.prod(shape[a] for a in block_axes)


def _bits_dtype(dtype: Any) -> np.dtype[Any]:
    return np.dtype(f"int{8 * np.dtype(dtype).itemsize}")


def index_digits(
    shape: tuple[int, ...], axes: Axes, zero: jax.Array | None = None
) -> counting.Limbs:
    """Row-major index of each entry inside its block, as int32 digits.

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
    return tuple(digits)


def _index_runs(shape: tuple[int, ...], axes: Axes) -> list[Axes]:
    """Runs of axes of less than LIMB_SIZE entries each, one for each digit."""
    runs: list[Axes] = []
    for axis in reversed(axes):
        if runs and math.prod(shape[a] for a in (axis, *runs[0])) < counting.LIMB_SIZE:
            runs[0] = (axis, *runs[0])
        else:
            runs.insert(0, (axis,))
    return runs
