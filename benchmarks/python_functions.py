"""Functions of Python's standard library as records: what they do, and how.

A question is a function's signature and its docstring's first paragraph, the answer is
its body. The records are made from the modules of the Python that runs this, so they
depend on its version, and are under its licence, that of the Python Software
Foundation. They stay on the machine: nothing of them is part of this project.
"""

import ast
import platform
import sysconfig
import textwrap
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HELD_OUT = 5  # one module in so many
LONGEST_QUESTION, LONGEST_ANSWER = 250, 400  # characters
# Not written for readers, or not of the library.
_LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}


class Functions(NamedTuple):
    """Records by use; no module has some in both."""

    training: list[dict[str, str]]  # "question" and "answer"
    held_out: list[dict[str, str]]


def version() -> str:
    """Version of the Python whose library is read, such as 3.11.9."""
    return platform.python_version()


def standard_library(root: Path | None = None) -> Functions:
    """The functions of all modules, in an order that no package has a part of.

    Modules are divided by a checksum of their names, so that another version of Python
    divides those that it shares with this one alike.

    Args:
      root: Directory of the modules; by default the running Python's.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    found = Functions([], [])
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(name.parts):
            held_out = _checksum(name.as_posix()) % HELD_OUT == 0
            (found.held_out if held_out else found.training).extend(_of_module(path))
    # Some modules have functions of others as they are.
    known = {record["question"] for record in found.training}
    new = [record for record in found.held_out if record["question"] not in known]
    return Functions(sorted(found.training, key=_place), sorted(new, key=_place))


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def _place(record: dict[str, str]) -> tuple[int, str]:
    return _checksum(record["question"]), record["answer"]


def _of_module(path: Path) -> Iterator[dict[str, str]]:
    try:
        source = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # there are some, for tools' own tests
        return
    lines = source.split("\n")  # a form feed ends no line here
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (record := _record(node, lines)):
            yield record


def _record(node: ast.FunctionDef, lines: list[str]) -> dict[str, str] | None:
    """None where there is no docstring, nothing after it, or too much."""
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:
        return None
    first, last = node.body[1], node.body[-1]
    body = textwrap.dedent("\n".join(lines[first.lineno - 1 : last.end_lineno]))
    summary = docstring.split("\n\n")[0]
    question = f'def {node.name}({ast.unparse(node.args)}):\n    """{summary}"""'
    if len(question) > LONGEST_QUESTION or len(body) > LONGEST_ANSWER:
        return None
    return {"question": question, "answer": body}
