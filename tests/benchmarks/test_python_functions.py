"""Functions of modules as records: what is taken, and for which use."""

import pytest

from benchmarks import python_functions
from benchmarks.python_functions import standard_library
from examples.files import write_json_lines
from examples.llama.text.records import read_records

SOURCE = '''
"""A module."""
\f
class Stack:
    def push(self, item: int, *, twice=False) -> None:
        """Puts an item on top.

        Twice, if wanted.
        """
        for _ in range(1 + twice):  # a comment
            self.items.append(item)

        return None

    def bare(self):
        return 1

    def silent(self):
        """Does nothing."""


def outer():
    """Has another one within."""
    return 2
'''


@pytest.fixture
def library(tmp_path):
    (tmp_path / "package/test").mkdir(parents=True)
    (tmp_path / "package/test/test_stack.py").write_text(SOURCE)
    (tmp_path / "package/broken.py").write_text("def f(:\n")
    for number in range(20):
        text = SOURCE.replace("push", f"push{number}")
        (tmp_path / f"package/stack{number}.py").write_text(text)
    return tmp_path


def test_records(library):
    found = standard_library(library)
    records = {r["question"]: r["answer"] for r in found.training + found.held_out}
    push = 'def push7(self, item: int, *, twice=False):\n    """Puts an item on top."""'
    assert records[push] == (
        "for _ in range(1 + twice):  # a comment\n"
        "    self.items.append(item)\n\nreturn None"
    )
    outer = 'def outer():\n    """Has another one within."""'
    assert records[outer] == "return 2"
    assert len(records) == 20 + 1


def test_no_module_and_no_question_is_in_both_uses(library):
    found = standard_library(library)
    assert found == standard_library(library)
    uses = [{r["question"] for r in records} for records in found]
    assert all(len(use) > 1 for use in uses) and not uses[0] & uses[1]
    # The same function of all modules is learned, not held out.
    assert any("outer" in question for question in uses[0])


def test_long_ones_are_left_out(library, monkeypatch):
    monkeypatch.setattr(python_functions, "LONGEST_ANSWER", 20)
    records = standard_library(library).training
    assert {record["answer"] for record in records} == {"return 2"}


@pytest.mark.slow
def test_this_python_has_enough(tmp_path):
    for name, records, least in zip(
        ("training", "held out"), standard_library(), (1500, 400), strict=True
    ):
        assert len(records) >= least, name
        path = tmp_path / "records.jsonl"
        write_json_lines(path, records)
        read = read_records(path)
        assert len(read.records) == len(records) and not read.bad
