"""What a compiled program costs and moves between devices, read from its text."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

Costs = Counter[str]  # cycles, kernels and bytes
# Operations that are no work of their own.
_FREE = re.compile(
    r"(parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call"
    r"|after-all|partition-id|replica-id|opt-barrier|\S+-done|\S+-update)$"
)
_CALLED = re.compile(
    r"(?:body|to_apply|(?:true|false)_computation|branch_computations)=\{?"
    r"(%?[\w.-]+)"
)
_DEFINED = re.compile(r"\s*(?:ROOT )?(%?[\w.-]+) = (.*?) ([\w-]+)\((.*)$")
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


def describe(compiled: Any) -> dict[str, Any]:
    """What a step costs.

    Cycles are the estimate of the TPU's compiler, and None of another; kernels that it
    did not write itself, as for attention, count none. Kernels are operations that run
    by themselves. Bytes are those of their operands and results.

    Returns:
      "step", all but loops of unknown length; "pass", each turn of the one that
      searches for thresholds, and "turn", of any other, such as the loss's; and the
      "collectives", "collective_bytes" and "temporary_bytes" of a chip.
    """
    text = compiled.as_text()
    computations = dict(_computations(text))
    (entry,) = (name for name in computations if name.startswith("ENTRY"))
    found = _Found(Counter(), Counter(), Counter())
    _add(computations, entry, found)
    moved = collectives(text)
    return {
        "step": _as_json(found.once),
        "pass": _as_json(found.per_pass),
        "turn": _as_json(found.per_turn),
        "collectives": len(moved),
        "collective_bytes": sum(
            dtype_bytes(dtype) * math.prod(shape)
            for found in moved
            for dtype, shape in found.arrays
        ),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def _as_json(costs: Costs) -> dict[str, int | None]:
    return {
        "cycles": costs["cycles"] or None,
        "kernels": costs["kernels"],
        "bytes": costs["bytes"],
    }


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """The names of a program's computations, and their lines."""
    name = ""
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and "->" in line:
            name, lines = line.split(" (")[0].split("(")[0].strip(), []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


class _Found(NamedTuple):
    once: Costs
    per_pass: Costs
    per_turn: Costs


def _add(computations: dict[str, list[str]], name: str, found: _Found) -> None:
    """Adds what a computation does, loops of known length as often as they run."""
    once = found.once
    sizes: dict[str, int] = {}
    for line in computations[name]:
        if not (match := _DEFINED.match(line)):
            continue
        defined, kind, operation, rest = match.groups()
        sizes[defined] = sum(_arrays(kind))
        if operation in ("while", "call", "conditional"):
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            target = once
            if operation == "while" and trips is None:
                searches = "search_masks" in line
                target = found.per_pass if searches else found.per_turn
            for called in _CALLED.findall(line):
                inside = found._replace(once=Counter())
                _add(computations, called, inside)
                for unit, cost in inside.once.items():
                    target[unit] += cost * (int(trips[1]) if trips else 1)
        elif not _FREE.match(operation):
            once["kernels"] += 1
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            once["cycles"] += int(cycles[1]) if cycles else 0
            if operation.endswith("-start"):  # its result has its operand in it
                once["bytes"] += min(filter(None, _arrays(kind)), default=0)
            else:
                operands = re.findall(r"%[\w.-]+", rest.split("), ")[0])
                once["bytes"] += sizes[defined] + sum(sizes.get(x, 0) for x in operands)


def _arrays(kind: str) -> list[int]:
    """The bytes of each array of a type, such as (f32[2,3]{1,0}, s32[]).

    Those that a TPU holds in its fast memory, space 1, count as none.
    """
    return [
        0
        if "S(1)" in layout
        else dtype_bytes(dtype) * math.prod(map(int, filter(None, shape.split(","))))
        for dtype, shape, layout in re.findall(
            r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", kind
        )
    ]
