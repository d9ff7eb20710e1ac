"""Imports go one way, and CONTRIBUTING.md shows them as they are."""

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from docs import rooms


@pytest.fixture
def graph():
    return rooms.build_graph()


def sort_modules(graph):
    return TopologicalSorter(
        {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    ).prepare()


def test_imports_keep_to_the_layers():
    # A process of its own: it changes how this one logs.
    command = Path(sys.executable).with_name("lint-imports")
    found = subprocess.run(
        [command, "--no-cache"], cwd=rooms.ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


def test_no_modules_import_each_other_in_a_circle(graph):
    sort_modules(graph)
    graph.add_import(importer="mofo_jax._leaves", imported="mofo_jax._mofo")
    with pytest.raises(CycleError, match="_leaves"):
        sort_modules(graph)


def test_the_picture_in_contributing_is_up_to_date():
    shown = rooms.BLOCK.search(rooms.PAGE.read_text())[0]
    assert shown == rooms.draw(), "run `make rooms`"


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("examples.llama.text.rows", "examples.llama.training.config"),  # up
        ("examples.llama.text.rows", "examples.llama.model.llama"),  # beside
        ("mofo_jax._selection.masks", "mofo_jax"),
    ],
)
def test_an_import_of_what_is_not_below_is_refused_by_name(graph, importer, imported):
    graph.add_import(importer=importer, imported=imported)
    with pytest.raises(SystemExit, match=f"{importer} imports {imported},"):
        rooms.find_arrows(rooms.list_rooms(), graph)


def test_a_module_in_no_room_is_refused_by_name():
    with pytest.raises(SystemExit, match=r"examples\.new is in no layer"):
        rooms.find_room("examples.new", rooms.list_rooms())


def test_arrows_that_follow_from_others_are_left_out():
    top, middle, bottom = (rooms.Room("", (name,), i) for i, name in enumerate("abc"))
    arrows = {(top, middle), (middle, bottom)}
    assert rooms.drop_implied({*arrows, (top, bottom)}) == arrows


def test_lines_are_counted_by_room_and_by_folder_of_tests():
    table = [row.split(maxsplit=2) for row in rooms.count_lines().splitlines()]
    assert table[0] == ["files", "lines"]
    places = {place: (int(files), int(lines)) for files, lines, place in table[1:]}
    assert places["mofo_jax._checks"] == (
        1,
        len(rooms.find_file("mofo_jax._checks").read_text().splitlines()),
    )
    assert places["tests/docs"][0] == 1
