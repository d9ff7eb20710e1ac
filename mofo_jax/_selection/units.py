"""Arrays of one kind, looked at together.

What is here beside the obvious is for the time that XLA takes to compile: it grows with
the number of instructions and of different kernels, and a model has hundreds of arrays.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mofo_jax._selection import counting
from mofo_jax._selection.brackets import vary, varying_axes
from mofo_jax._selection.candidates import Gathered, gather
from mofo_jax._selection.ranking import index_digits, reaches

# How many slices one kernel makes: the time to compile it grows faster than they do.
_SLICES = 32

# How many arrays of one kind make a unit. All of it is read until its last block is
# done, which more arrays make later.
_UNIT = 16


def make_units(
    kinds: list[tuple[tuple[int, ...], Any, tuple[int, ...]]],
) -> list[list[int]]:
    """Indices of neighbouring arrays of one kind, a unit for each list.

    Their sizes are powers of two, as each size of a kind has kernels of its own.
    """
    units: list[list[int]] = []
    for _, run in itertools.groupby(range(len(kinds)), kinds.__getitem__):
        rest = list(run)
        while rest:
            size = min(_UNIT, 2 ** (len(rest).bit_length() - 1))
            units.append(rest[:size])
            rest = rest[size:]
    return units


def each(part: jax.Array, members: int) -> list[jax.Array]:
    """The columns of each array of a unit."""
    size = part.shape[-1] // members
    return [part[..., i * size : (i + 1) * size] for i in range(members)]


def slices(table: jax.Array, widths: list[int]) -> list[jax.Array]:
    """Columns of a table, one range after the other."""
    return jnp.split(table, np.cumsum(widths)[:-1].tolist(), axis=-1)


def split(table: jax.Array, widths: list[int]) -> list[jax.Array]:
    """As :func:`slices`, with one kernel for all parts of a width.

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
        sums = counting.sum_together([parts[i] for i in places], along)
        for i, part in zip(places, sums, strict=True):
            parts[i] = part
    return parts


# Traced once for each kind of unit.
@functools.partial(
    jax.jit, static_argnames=("axes", "digits", "limbs", "choose", "gathers")
)
def look_at(
    xs: list[jax.Array],
    part: jax.Array,
    axes: tuple[int, ...],
    digits: int,
    limbs: int,
    choose: bool,
    gathers: bool,
) -> jax.Array:
    """What a unit's part of a request asks, ``[rows, probes, blocks]``.

    The rows are the limbs of the counts, and, if it may ``choose`` what to do, those of
    Gathered. Otherwise it counts always, and for nothing where a block is done.
    """

    def counted(xs: list[jax.Array], part: jax.Array) -> jax.Array:
        zero = (part[0, 0, 0] < 0).astype(jnp.int32)
        stacks, along = xs, axes
        if choose:
            stacks, along = _stacks(xs), tuple(1 + a for a in axes)
        # One index for all is less to compile, but where arrays of one shape are split
        # over devices in different ways it would be moved between them.
        index_of = lambda x: index_digits(x.shape, along, zero)
        indices = [index_of(stacks[0])] * len(stacks) if choose else map(index_of, xs)
        indexed = list(zip(stacks, indices, strict=True))
        marks = []
        for probe in range(part.shape[1]):
            rows = [each(row, len(stacks)) for row in part[: 1 + digits, probe]]
            thresholds = zip(*rows, strict=True)
            for (x, index), threshold in zip(indexed, thresholds, strict=True):
                marks.append(reaches(x, threshold, index, along))
        counts = counting.count(marks, along, zero)
        table = jnp.stack(counts).reshape(-1, *part.shape[1:])
        before = limbs - len(counts)
        return _rows(table, before, len(Gathered._fields) * choose, part.dtype)

    def gathered(xs: list[jax.Array], part: jax.Array) -> jax.Array:
        low, high, *numbers = part[2 + digits :, 0]
        found = gather(_stacks(xs), low, high, *(n.astype(jnp.uint32) for n in numbers))
        table = jnp.stack([row.astype(part.dtype) for row in found])
        table = jnp.broadcast_to(table[:, None], (len(found), *part.shape[1:]))
        return _rows(table, limbs, 0, part.dtype)

    def skipped(xs: list[jax.Array], part: jax.Array) -> jax.Array:
        zeros = jnp.zeros((limbs + len(Gathered._fields), *part.shape[1:]), part.dtype)
        varied: jax.Array = vary(zeros, varying_axes(part))
        return varied

    if not choose:
        return counted(xs, part)
    mode = jnp.max(part[1 + digits]).astype(jnp.int32)
    branches = [skipped, gathered if gathers else skipped, counted]
    answer: jax.Array = lax.switch(mode, branches, xs, part)
    return answer


def _stacks(xs: list[jax.Array]) -> list[jax.Array]:
    """Few arrays of several each: what XLA fuses with their reduction is not a copy."""
    size = max(1, len(xs) // counting.STREAMS)
    return [jnp.stack(xs[i : i + size]) for i in range(0, len(xs), size)]


def _rows(table: jax.Array, before: int, after: int, dtype: Any) -> jax.Array:
    """The table between rows of zeros."""
    places = [(before, after, 0), (0, 0, 0), (0, 0, 0)]
    return lax.pad(table.astype(dtype), np.zeros((), dtype), places)
