"""Arrays of one kind in groups, so that XLA has less to compile.

Its time grows with the number of instructions and of different kernels, and a model
has hundreds of arrays. A pass is traced once for each kind of group.

Numbers of a search stand in tables with a column for each block, array after array.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mofo_jax._selection.counting import Integers
from mofo_jax._selection.ranking import Axes, block_count, mark

# How many arrays of one kind make a group. All of it is read until its last block is
# done, which more arrays make later.
_LARGEST = 16


class Columns(NamedTuple):
    """How many columns each array and each group has in a table.

    Attributes:
      arrays: number of blocks of each array.
      groups: number of blocks of each group.
      members: indices of the arrays of each group.
    """

    arrays: list[int]
    groups: list[int]
    members: list[list[int]]


def columns(
    arrays: list[jax.Array], block_axes: list[Axes], stacked: int = 0
) -> Columns:
    """Groups of neighbouring arrays of one kind.

    Args:
      arrays: Those of a search.
      block_axes: For each array.
      stacked: How many arrays a group may have where each is read by one kernel. 0
        where each array is read by its own: then the sizes are powers of two, as each
        size of a kind has kernels of its own.
    """
    kinds = [(x.shape, x.dtype, a) for x, a in zip(arrays, block_axes, strict=True)]
    members: list[list[int]] = []
    for _, run in itertools.groupby(range(len(kinds)), kinds.__getitem__):
        rest = list(run)
        while rest:
            size = stacked or min(_LARGEST, 2 ** (len(rest).bit_length() - 1))
            members.append(rest[:size])
            rest = rest[size:]
    counts = [block_count(shape, a) for shape, _, a in kinds]
    return Columns(counts, [sum(counts[i] for i in m) for m in members], members)


def slices(table: jax.Array, widths: list[int]) -> list[jax.Array]:
    """Columns of a table, one range after the other."""
    return jnp.split(table, np.cumsum(widths)[:-1].tolist(), axis=-1)


def marks_of(
    xs: list[jax.Array],
    indices: Sequence[Integers | None],
    thresholds: jax.Array,
    axes: Axes,
) -> list[jax.Array]:
    """Marks what reaches the thresholds ``[rows, probes, blocks]`` of a group.

    Where indices are None, thresholds are magnitudes alone.

    A list of each array's marks for the first probe, then for the next one.
    """
    marks = []
    for probe in range(thresholds.shape[1]):
        rows = [_each(row, len(xs)) for row in thresholds[:, probe]]
        for x, index, *threshold in zip(xs, indices, *rows, strict=True):
            marks.append(mark(x, tuple(threshold), index, axes))
    return marks


def counts_table(counts: Integers, like: jax.Array, size: int) -> jax.Array:
    """Counts of :func:`marks_of` as ``[size, probes, blocks]``, a limb in each row."""
    table = jnp.stack(counts.limbs).reshape(-1, *like.shape[1:])
    return padded(table, size - len(counts.limbs), 0, like.dtype)


def as_table(rows: list[jax.Array], like: jax.Array) -> jax.Array:
    """Rows of one entry a block, each as ``[probes, blocks]`` of like's dtype."""
    return jnp.stack([jnp.broadcast_to(r.astype(like.dtype), like.shape) for r in rows])


def padded(table: jax.Array, before: int, after: int, dtype: Any) -> jax.Array:
    """The table between rows of zeros."""
    if before == after == 0:
        return table.astype(dtype)
    places = [(before, after, 0), (0, 0, 0), (0, 0, 0)]
    return jax.lax.pad(table.astype(dtype), np.zeros((), dtype), places)


def _each(part: jax.Array, members: int) -> list[jax.Array]:
    """The columns of each array of a group."""
    size = part.shape[-1] // members
    return [part[..., i * size : (i + 1) * size] for i in range(members)]
