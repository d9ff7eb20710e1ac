"""What the commands of the examples have in common on a terminal."""

import contextlib
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib import metadata
from types import FrameType
from typing import Any

LESS_MEMORY = (
    "to take less memory: a smaller --batch-size, more --accumulate, --remat full, "
    "--lora-rank, or a --mesh of more devices"
)


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
        return
    except Stopped as stopped:
        code, message = 128 + stopped.signum, str(stopped)
    except FloatingPointError as error:
        code, message = 1, str(error)
    except (OSError, ValueError) as error:
        code, message = 2, str(error)
    except ImportError as error:
        code, message = 2, f"{error}{_extra_with(error.name or '')}"
    except RuntimeError as error:  # JAX's, told by its text to do without JAX here
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        code, message = 2, f"{str(error).splitlines()[0]}; {LESS_MEMORY}"
    print(f"{program}: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(code)


def _extra_with(module: str) -> str:
    """How to install a module, where an extra of this project has its package."""
    try:
        requirements = metadata.requires("mofo_jax") or []
    except metadata.PackageNotFoundError:
        return ""
    package = module.partition(".")[0].replace("_", "-")
    pattern = re.compile(rf"{re.escape(package)}(?![\w-]).*extra == ['\"](\w+)['\"]")
    extras = [match[1] for match in map(pattern.match, requirements) if match]
    found = next((extra for extra in extras if extra != "all"), None)
    return f"; pip install '.[{found}]' brings it" if found else ""
