"""Draw the rooms of the code and the imports between them into CONTRIBUTING.md.

``make rooms`` runs this. The rooms and their order are the layers of import-linter's
contracts in pyproject.toml: every package in a layer is a room, and the modules in a
layer are one room together. ``--lines`` prints how long the rooms are instead.
"""

import argparse
import ast
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grimp
from importlinter import api

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BLOCK = re.compile(r"(?<=<!-- rooms -->\n).*?(?=<!-- /rooms -->)", re.DOTALL)


@dataclass(frozen=True)
class Room:
    """A package, or the modules of one layer. The depth grows from top to bottom."""

    parent: str
    names: tuple[str, ...]
    depth: int

    @property
    def label(self) -> str:
        label = f"<b>{', '.join(name.rpartition('.')[2] for name in self.names)}</b>"
        if len(self.names) == 1:
            docstring = ast.get_docstring(
                ast.parse(find_file(self.names[0]).read_text())
            )
            assert docstring, f"{self.names[0]} has no docstring"
            label += "<br/>" + docstring.splitlines()[0].removesuffix(".")
        return label


def find_file(name: str) -> Path:
    """The file of a module or of a package's ``__init__``."""
    path = ROOT / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def read_layers() -> dict[str, list[list[str]]]:
    """The layers of each package from top to bottom; those of "" are whole packages."""
    config = api.read_configuration(str(ROOT / "pyproject.toml"))
    return {
        package: [
            [f"{package}.{name}".lstrip(".") for name in re.findall(r"[\w.]+", layer)]
            for layer in contract["layers"]
        ]
        for contract in config["contracts_options"]
        if contract["type"] == "layers"
        for package in contract.get("containers", [""])
    }


def list_rooms(package: str = "", above: int = 0) -> list[Room]:
    """The rooms in a package from top to bottom; rooms of one layer share a depth."""
    layers = read_layers()
    rooms: list[Room] = []
    for names in layers[package]:
        depth = above + len(rooms)
        names = [name for name in names if find_file(name).exists()]
        packages = [name for name in names if find_file(name).stem == "__init__"]
        if modules := tuple(name for name in names if name not in packages):
            rooms.append(Room(package, modules, depth))
        for name in packages:
            inner = list_rooms(name, depth) if name in layers else []
            rooms += inner or [Room(package, (name,), depth)]
    return rooms


def find_room(module: str, rooms: list[Room]) -> Room:
    """The room of a module. A package made of rooms is in its first room of modules."""
    for room in rooms:
        if any(f"{module}.".startswith(f"{name}.") for name in room.names):
            return room
    for room in rooms:
        if room.parent == module and find_file(room.names[0]).stem != "__init__":
            return room
    raise SystemExit(f"{module} is in no layer of the contracts in pyproject.toml")


def build_graph() -> grimp.ImportGraph:
    return grimp.build_graph(*(names[0] for names in read_layers()[""]), cache_dir=None)


def find_arrows(rooms: list[Room], graph: grimp.ImportGraph) -> set[tuple[Room, Room]]:
    """Who imports whom. Raises if an arrow does not lead downwards."""
    arrows = set()
    for module in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            start, end = find_room(module, rooms), find_room(imported, rooms)
            if start != end and start.depth >= end.depth:
                raise SystemExit(f"{module} imports {imported}, which is not below it")
            if start != end:
                arrows.add((start, end))
    return arrows


def drop_implied(arrows: set[tuple[Room, Room]]) -> set[tuple[Room, Room]]:
    """The arrows without those whose end other arrows lead to as well."""
    below: dict[Room, set[Room]] = {}
    for start, end in sorted(arrows, key=lambda arrow: -arrow[0].depth):
        below.setdefault(start, set()).update({end}, below.get(end, set()))
    return {
        (start, end)
        for start, end in arrows
        if not any((start, r) in arrows and end in below[r] for r in below)
    }


def draw() -> str:
    """The picture as a Mermaid flowchart."""
    rooms = list_rooms()

    def boxes(package: str) -> list[str]:
        lines = [f'{r.names[0]}["{r.label}"]' for r in rooms if r.parent == package]
        for inner in read_layers():
            if inner and inner.rpartition(".")[0] == package:
                lines += [f'subgraph {inner}.rooms["{inner}"]', *boxes(inner), "end"]
        return lines

    arrows = drop_implied(find_arrows(rooms, build_graph()))
    lines = sorted(f"{start.names[0]} --> {end.names[0]}" for start, end in arrows)
    return "\n".join(["```mermaid", "flowchart TD", *boxes(""), *lines, "```", ""])


def count_lines() -> str:
    """A table of files and lines for each room and each folder of tests."""
    rooms = list_rooms()
    files = [
        (", ".join(find_room(module, rooms).names), find_file(module))
        for module in sorted(build_graph().modules)
    ]
    tests = sorted((ROOT / "tests").rglob("*.py"))
    files += [(str(path.parent.relative_to(ROOT)), path) for path in tests]
    lines: Counter[str] = Counter()
    for place, path in files:
        lines[place] += len(path.read_text().splitlines())
    counts = Counter(place for place, _ in files)
    rows = [f"{counts[place]:5} {lines[place]:6}  {place}" for place in lines]
    return "\n".join(["files  lines", *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m docs.rooms",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--lines", action="store_true", help="print lengths instead")
    if parser.parse_args().lines:
        print(count_lines())
    else:
        PAGE.write_text(BLOCK.sub(lambda _: draw(), PAGE.read_text()))
