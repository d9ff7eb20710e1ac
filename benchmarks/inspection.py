"""What a compiled program moves between devices, and how many passes a search takes."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from mofo_jax._selection import masks as selection

_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)"
    r"(?:-start)?\("
)


class Collective(NamedTuple):
    """A collective operation: its kind, each array's dtype and shape, its line."""

    kind: str
    arrays: list[tuple[str, tuple[int, ...]]]
    line: str


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, given as its text."""
    found = []
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = lambda shape: tuple(int(d) for d in shape.split(",") if d)
            arrays = [(dtype, sizes(shape)) for dtype, shape in shapes]
            found.append(Collective(match[2], arrays, line))
    return found


@contextlib.contextmanager
def passes_taken() -> Iterator[list[None]]:
    """A list that grows by an item with every pass of programs traced meanwhile.

    Wait for them with :func:`jax.effects_barrier`.
    """
    passes: list[None] = []
    original = selection.search

    def counting_search(look: Any, *rest: Any) -> Any:
        def counted(packed: jax.Array) -> Any:
            jax.debug.callback(lambda _: passes.append(None), packed[0, 0, 0])
            return look(packed)

        return original(counted, *rest)

    selection.search = counting_search
    try:
        yield passes
    finally:
        selection.search = original
