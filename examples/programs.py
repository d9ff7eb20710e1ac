"""What a compiled program moves between devices."""

import re
from typing import NamedTuple

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


def dtype_bytes(name: str) -> int:
    """The bytes of a number, by the name of its type in XLA; 0 for a token."""
    if name == "pred":
        return 1
    bits = re.search(r"\d+", name)
    return -(-int(bits[0]) // 8) if bits else 0
