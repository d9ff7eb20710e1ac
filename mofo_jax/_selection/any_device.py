"""Passes for any device or mesh: they count, and leave the arrays as they lie."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mofo_jax._selection.brackets import Brackets, narrow, next_digit, thresholds
from mofo_jax._selection.counting import Integers, count
from mofo_jax._selection.groups import as_table, columns, counts_table, marks_of, slices
from mofo_jax._selection.probes import first_probes, next_probes
from mofo_jax._selection.ranking import Axes, describe, entry_axes, index_digits, mark


class AnyDevice:
    """:class:`.search.Passes` with nothing to remember between two of them."""

    probes = 4
    opening = 0  # how many thresholds are counted for before the first pass, 8 or none
    stacked = 0  # how many arrays of a kind are counted as one, at most; 0 for none

    def __init__(
        self, arrays: list[jax.Array], block_axes: list[Axes], k: Integers
    ) -> None:
        pairs = zip(arrays, block_axes, strict=True)
        self.arrays = arrays
        self.axes = [entry_axes(x.shape, a) for x, a in pairs]
        self.blocks = describe(arrays, self.axes, k)
        self.columns = columns(arrays, block_axes, self.stacked)

    def start(
        self, brackets: Brackets, guess: jax.Array
    ) -> tuple[Brackets, jax.Array, tuple[()]]:
        positions = first_probes(self.blocks, guess, self.opening or self.probes)
        if self.opening:
            magnitudes = positions[None]
            brackets = self._narrowed(brackets, positions, magnitudes, self.arrays)
            # XLA keeps the arrays from here on, however they were made.
            brackets, self.arrays = lax.optimization_barrier((brackets, self.arrays))
            brackets = next_digit(brackets, self.blocks)
            positions, brackets = next_probes(brackets, self.blocks, self.probes)
        return brackets, positions, ()

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
        return self._narrowed(brackets, positions, request, arrays), ()

    def _narrowed(
        self,
        brackets: Brackets,
        positions: jax.Array,
        request: jax.Array,
        arrays: list[jax.Array],
    ) -> Brackets:
        """The brackets after counting what reaches thresholds, for `_count_pass`."""
        parts = slices(request, self.columns.groups)
        limbs = len(self.blocks.k.limbs)
        answers = [
            _count_pass(
                [arrays[i] for i in group],
                part,
                self.axes[group[0]],
                limbs,
                stacked=self.stacked > 0,
            )
            for group, part in zip(self.columns.members, parts, strict=True)
        ]
        counts = jnp.concatenate(answers, axis=-1).astype(jnp.uint32)
        return narrow(brackets, positions, Integers(tuple(counts)), self.blocks)

    def masks(self, thresholds: jax.Array) -> list[jax.Array]:
        rows = [slices(row, self.columns.arrays) for row in thresholds]
        return [
            mark(x, tuple(threshold), index_digits(x.shape, axes), axes)
            for x, axes, *threshold in zip(self.arrays, self.axes, *rows, strict=True)
        ]


class TPUs(AnyDevice):
    """The same for TPUs, whose compiler joins a first count with the work before it.

    While the arrays are made, the counts of up to 8 magnitudes cost nothing there, by
    the compiler's estimate, and spare one pass or two.
    """

    opening = 8


class OneGPU(AnyDevice):
    """The same for a GPU, where every kernel takes microseconds to start.

    The arrays of a kind are counted in one, which reads them where they lie. On a mesh
    that would move those that are divided in another way than the others of their kind.
    """

    stacked = 64  # XLA fuses up to 96 operands


@functools.partial(jax.jit, static_argnames=("axes", "limbs", "stacked"))
def _count_pass(
    xs: list[jax.Array],
    thresholds: jax.Array,
    axes: Axes,
    limbs: int,
    *,
    stacked: bool,
) -> jax.Array:
    """How many entries of a group reach thresholds: ``[limbs, probes, blocks]``.

    Thresholds ``[rows, probes, blocks]``; of one row they are magnitudes alone.
    """
    zero = (thresholds[0, 0, 0] < 0).astype(jnp.int32)
    if stacked and len(xs) > 1:
        xs, axes = [jnp.stack(xs)], tuple(a + 1 for a in axes)
    # An index for each: where arrays of one shape are split over devices in different
    # ways, one for all would be moved between them.
    indices = [
        index_digits(x.shape, axes, zero) if len(thresholds) > 1 else None for x in xs
    ]
    counts = count(marks_of(xs, indices, thresholds, axes), axes)
    return counts_table(counts, thresholds, limbs)
