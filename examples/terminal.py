"""What the commands of the examples have in common on a terminal."""

import contextlib
import shutil
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Stopped(Exception):
    """A signal ended a run; all that it did so far is kept."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Whether SIGTERM or SIGINT came, so that work ends where it can be taken up.

    Handles the signals within a `with` block of the main thread. The second of them
    ends the process at once.
    """

    signum: int | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signum = number
        self.__exit__()


def bar_style() -> dict[str, Any]:
    """For tqdm, which draws nothing where a terminal does not tell its size."""
    columns, lines = shutil.get_terminal_size()
    times = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    return {"bar_format": times, "ncols": columns, "nrows": lines}


@contextlib.contextmanager
def errors_on_one_line(program: str) -> Iterator[None]:
    """Ends the process with a line on stderr.

    The exit code is 2, 1 for an odd loss, and 128 + N after a signal N, as shells have
    it: 143 for SIGTERM, 130 for SIGINT.
    """
    try:
        yield
    except Stopped as stopped:
        print(f"{program}: {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signum) from None
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from None
