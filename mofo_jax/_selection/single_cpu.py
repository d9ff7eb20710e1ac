"""Passes for a single CPU device, which needs fewer of them and runs them faster.

A pass reads memory from several places at once. A second probe costs nothing there; a
third would. Once a bracket holds few candidates, a pass gathers their magnitudes
instead of counting, and the search ends among them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mofo_jax._selection.brackets import (
    Brackets,
    narrow,
    thresholds,
    unfinished,
    vary,
    varying_axes,
)
from mofo_jax._selection.counting import Integers
from mofo_jax._selection.groups import as_table, columns, counts_table, marks_of, padded
from mofo_jax._selection.probes import first_probes
from mofo_jax._selection.ranking import Axes, describe, entry_axes, index_digits, mark
from mofo_jax._selection.single_cpu_kernels import (
    Gathered,
    count_rows,
    gather,
    gather_limit,
    rows_of_blocks,
    split,
    stacked,
)

# A group does what the most demanding of its blocks asks for: the last of these.
DONE, GATHER, COUNT = range(3)

# Rows of a request after the thresholds: the mode, both ends of the bracket, which
# largest of the magnitudes in it is searched for, and how many there are.
_BRACKET_ROWS = 5


class Memory(NamedTuple):
    """What a pass leaves for the next one.

    Attributes:
      gathered: whether it gathered magnitudes.
      hint: a magnitude to try next, and the one after it, or -1.
    """

    gathered: jax.Array
    hint: jax.Array


class SingleCPU:
    """:class:`.search.Passes` that count or gather."""

    probes = 2

    def __init__(
        self, arrays: list[jax.Array], block_axes: list[Axes], k: Integers
    ) -> None:
        pairs = list(zip(arrays, block_axes, strict=True))
        self.arrays = arrays
        self.views = [rows_of_blocks(x, a) for x, a in pairs]
        self.view_axes = [
            entry_axes(v.shape, a) for v, a in zip(self.views, block_axes, strict=True)
        ]
        self.axes = [entry_axes(x.shape, a) for x, a in pairs]
        self.blocks = describe(self.views, self.view_axes, k)
        self.columns = columns(arrays, block_axes)
        views = zip(self.views, self.view_axes, strict=True)
        self.gather_limits = [gather_limit(v.shape, a) for v, a in views]

    def start(
        self, brackets: Brackets, guess: jax.Array
    ) -> tuple[Brackets, jax.Array, Memory]:
        memory = Memory(jnp.zeros(guess.shape, bool), jnp.full_like(guess, -1))
        return brackets, first_probes(self.blocks, guess, self.probes), memory

    def request(
        self, brackets: Brackets, positions: jax.Array, memory: Memory
    ) -> tuple[jax.Array, jax.Array]:
        low, high, level = brackets.low, brackets.high, brackets.level
        next_to = np.arange(self.probes, dtype=positions.dtype)[:, None]
        hints = jnp.minimum(jnp.maximum(memory.hint + next_to, low + 1), high)
        hinted = (memory.hint >= 0) & (level == 0)
        positions = jnp.where(hinted, hints, positions)

        live = unfinished(brackets, self.blocks)
        held = brackets.reached - brackets.exceeded
        limit = np.repeat(self.gather_limits, self.columns.arrays)[None]
        few = held.to_float() <= jnp.asarray(limit, jnp.float32)
        possible = (limit > 0) & (level == 0) & ~memory.gathered
        gathers = possible & (few | brackets.stuck)
        mode = jnp.where(live, jnp.where(gathers, GATHER, COUNT), DONE)
        high = jnp.where(live, high, low)  # nothing to narrow where it is done
        need = (self.blocks.k - brackets.exceeded).limbs[-1]
        rows = thresholds(brackets, positions, self.blocks)
        rows += [mode, low, high, need, held.limbs[-1]]
        return positions, as_table(rows, positions)

    def take(
        self, brackets: Brackets, positions: jax.Array, request: jax.Array
    ) -> tuple[Brackets, Memory]:
        limbs = len(self.blocks.k.limbs)
        parts = split(request, self.columns.groups)
        answers = [
            _read_pass(
                [self.views[i] for i in group],
                part,
                self.view_axes[group[0]],
                limbs,
                self.gather_limits[group[0]] > 0,
            )
            for group, part in zip(self.columns.members, parts, strict=True)
        ]
        answer = jnp.concatenate(answers, axis=-1)
        counts = Integers(tuple(answer[:limbs].astype(jnp.uint32)))
        value, *numbers = answer[limbs:, :1]
        gathered = Gathered(value, *(n.astype(jnp.uint32) for n in numbers))
        counted = narrow(brackets, positions, counts, self.blocks)
        return _narrow_to(counted, brackets, gathered)

    def masks(self, thresholds: jax.Array) -> list[jax.Array]:
        rows = [split(row, self.columns.arrays) for row in thresholds]
        # One index for all arrays of a shape is less to compile.
        kinds = [(x.shape, a) for x, a in zip(self.arrays, self.axes, strict=True)]
        index = {kind: index_digits(*kind) for kind in dict.fromkeys(kinds)}
        return [
            mark(x, tuple(threshold), index[kind], kind[1])
            for x, kind, *threshold in zip(self.arrays, kinds, *rows, strict=True)
        ]


def _narrow_to(
    counted: Brackets, before: Brackets, gathered: Gathered
) -> tuple[Brackets, Memory]:
    """Brackets where magnitudes were gathered, not counted."""
    value, *numbers = gathered
    # One limb: blocks with more entries are not gathered.
    *rest, last = before.exceeded.limbs
    seen, reached, exceeded = (Integers((*rest, number)) for number in numbers)
    add = lambda number: Integers((*rest, last + number.limbs[-1]))
    done = gathered.reached > 0
    exact = done & seen.equals(before.reached - before.exceeded)
    new = before._replace(
        low=jnp.where(exact, value, before.low),
        high=jnp.where(exact, value, before.high),
        reached=Integers.where(exact, add(reached), before.reached),
        exceeded=Integers.where(exact, add(exceeded), before.exceeded),
    )
    merged: Brackets = jax.tree.map(lambda a, b: jnp.where(done, a, b), new, counted)
    hinted = done & ~exact & (value > before.low)
    return merged, Memory(done, jnp.where(hinted, value, -1))


@functools.partial(jax.jit, static_argnames=("axes", "limbs", "gathers"))
def _read_pass(
    xs: list[jax.Array], request: jax.Array, axes: Axes, limbs: int, gathers: bool
) -> jax.Array:
    """What a group's part of a request asks: ``[rows, probes, blocks]``.

    The rows are the limbs of the counts and those of Gathered; zeros where the mode
    does not ask for them.
    """
    fields = len(Gathered._fields)

    def counted(xs: list[jax.Array], request: jax.Array) -> jax.Array:
        stacks, along = stacked(xs), tuple(1 + a for a in axes)
        zero = (request[0, 0, 0] < 0).astype(jnp.int32)
        indices = [index_digits(stacks[0].shape, along, zero)] * len(stacks)
        marks = marks_of(stacks, indices, request[:-_BRACKET_ROWS], along)
        table = counts_table(count_rows(marks, along, zero), request, limbs)
        return padded(table, 0, fields, request.dtype)

    def gathered(xs: list[jax.Array], request: jax.Array) -> jax.Array:
        low, high, *numbers = request[1 - _BRACKET_ROWS :, 0]
        found = gather(stacked(xs), low, high, *(n.astype(jnp.uint32) for n in numbers))
        table = jnp.stack([row.astype(request.dtype) for row in found])
        table = jnp.broadcast_to(table[:, None], (fields, *request.shape[1:]))
        return padded(table, limbs, 0, request.dtype)

    def skipped(xs: list[jax.Array], request: jax.Array) -> jax.Array:
        zeros = jnp.zeros((limbs + fields, *request.shape[1:]), request.dtype)
        varied: jax.Array = vary(zeros, varying_axes(request))
        return varied

    mode = jnp.max(request[-_BRACKET_ROWS]).astype(jnp.int32)
    branches = [skipped, gathered if gathers else skipped, counted]
    answer: jax.Array = lax.switch(mode, branches, xs, request)
    return answer
