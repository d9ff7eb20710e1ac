"""What the commands of the examples have in common on a terminal."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any


def bar_style() -> dict[str, Any]:
    """For tqdm, which draws nothing where a terminal does not tell its size."""
    columns, lines = shutil.get_terminal_size()
    times = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    return {"bar_format": times, "ncols": columns, "nrows": lines}


@contextlib.contextmanager
def errors_on_one_line(program: str) -> Iterator[None]:
    """Ends the process with a line on stderr: exit code 2, or 1 for an odd loss."""
    try:
        yield
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from None
