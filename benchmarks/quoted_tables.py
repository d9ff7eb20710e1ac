"""Renew the tables that the documents quote from the results.

python -m benchmarks.quoted_tables README.md docs/forgetting.md

A table is renewed where a comment above it says whose it is, as
<!-- First table of docs/results/facts.md -->, a path from the working directory.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import tyro

from examples import terminal
from examples.files import write_bytes

QUOTED = re.compile(r"(<!-- First table of (\S+) -->\n\n)((?:\|.*\n)*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    documents: tyro.conf.Positional[tuple[Path, ...]]
    """Markdown files whose tables to renew."""


def renew(text: str, directory: Path) -> str:
    """The text of a document with its quoted tables as the files have them.

    Args:
      text: Of the document, in Markdown.
      directory: What the files' paths are relative to.

    Raises:
      OSError: A file cannot be read.
      ValueError: A file has no table.
    """

    def quote(found: re.Match[str]) -> str:
        source = (directory / found[2]).read_text()
        table = re.search(r"^(?:\|.*\n)+", source, re.MULTILINE)
        if table is None:
            raise ValueError(f"{directory / found[2]}: no table")
        return found[1] + table[0]

    return QUOTED.sub(quote, text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it with one line and exit code 2."""
    program = "python -m benchmarks.quoted_tables"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("quoted_tables"):
        for path in args.documents:
            write_bytes(path, renew(path.read_text(), Path()).encode())


if __name__ == "__main__":
    main()
