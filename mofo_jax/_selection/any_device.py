"""Passes for any device or mesh: they count, and leave the arrays as they lie."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mofo_jax._selection.brackets import Brackets, narrow, thresholds
from mofo_jax._selection.counting import Integers, count
from mofo_jax._selection.groups import as_table, columns, counts_table, marks_of, slices
from mofo_jax._selection.ranking import Axes, describe, entry_axes, index_digits, mark


class AnyDevice:
    """:class:`.search.Passes` with nothing to remember between two of them."""

    probes = 4

    def __init__(
        self, arrays: list[jax.Array], block_axes: list[Axes], k: Integers
    ) -> None:
        pairs = zip(arrays, block_axes, strict=True)
        self.arrays = arrays
        self.axes = [entry_axes(x.shape, a) for x, a in pairs]
        self.blocks = describe(arrays, self.axes, k)
        self.columns = columns(arrays, block_axes)

    def start(self, guess: jax.Array) -> tuple[()]:
        return ()

    def request(
        self, brackets: Brackets, positions: jax.Array, memory: tuple[()]
    ) -> tuple[jax.Array, jax.Array]:
        rows = thresholds(brackets, positions, self.blocks)
        return positions, as_table(rows, positions)

    def take(
        self, brackets: Brackets, positions: jax.Array, request: jax.Array
    ) -> tuple[Brackets, tuple[()]]:
        # The barrier ties the arrays to the loop's variables. Without it XLA hoists
        # their magnitudes out of the loop, which keeps a copy of all of them alive.
        request, arrays = lax.optimization_barrier((request, self.arrays))
        parts = slices(request, self.columns.groups)
        limbs = len(self.blocks.k.limbs)
        answers = [
            _count_pass([arrays[i] for i in group], part, self.axes[group[0]], limbs)
            for group, part in zip(self.columns.members, parts, strict=True)
        ]
        counts = jnp.concatenate(answers, axis=-1).astype(jnp.uint32)
        return narrow(brackets, positions, Integers(tuple(counts)), self.blocks), ()

    def masks(self, thresholds: jax.Array) -> list[jax.Array]:
        rows = [slices(row, self.columns.arrays) for row in thresholds]
        return [
            mark(x, tuple(threshold), index_digits(x.shape, axes), axes)
            for x, axes, *threshold in zip(self.arrays, self.axes, *rows, strict=True)
        ]


@functools.partial(jax.jit, static_argnames=("axes", "limbs"))
def _count_pass(
    xs: list[jax.Array], thresholds: jax.Array, axes: Axes, limbs: int
) -> jax.Array:
    """How many entries of a group reach: ``[limbs, probes, blocks]``."""
    zero = (thresholds[0, 0, 0] < 0).astype(jnp.int32)
    # An index for each: where arrays of one shape are split over devices in different
    # ways, one for all would be moved between them.
    indices = [index_digits(x.shape, axes, zero) for x in xs]
    counts = count(marks_of(xs, indices, thresholds, axes), axes)
    return counts_table(counts, thresholds, limbs)
