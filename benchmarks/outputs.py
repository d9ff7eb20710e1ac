"""What benchmarks leave: numbers as JSON, and beside it a table and a plot."""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.files import lock, read_json_object

_locked: set[Path] = set()  # results' files, by this process


def make_room(output: Path) -> None:
    """Makes the directory of a results' file, and keeps other processes from the file.

    The lock lasts until this process ends. The file that it is on is hidden.

    Raises:
      ValueError: The file is none of JSON, or another process is writing it.
      OSError: The directory cannot be made.
    """
    if output.suffix != ".json":
        raise ValueError(f"output must end in .json, got {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.resolve().with_name(f".{output.name}.lock")
    if path not in _locked:
        descriptor = lock(path, output)
        _locked.add(path)
        atexit.register(_release, path, descriptor)


def _release(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)


def load(
    path: Path, settings: dict[str, Any], runs: Sequence[str] = ()
) -> dict[str, Any] | None:
    """The results to resume from; None where there is no file.

    Args:
      path: The JSON file.
      settings: Entries that it must have, with these values: what numbers depend on.
      runs: Fields that each of its "runs" must have; with none given, it needs no runs.

    Raises:
      ValueError: The file is no such JSON object, or is of other settings.
    """
    if not path.exists():
        return None
    found = read_json_object(path)
    fits = found.keys() >= settings.keys()
    if runs:
        try:
            fits &= all(run.keys() >= set(runs) for run in found["runs"])
        except (KeyError, TypeError, AttributeError):
            fits = False
    if not fits:
        names = [*settings, f"runs of {', '.join(runs)}"] if runs else [*settings]
        raise ValueError(f"{path}: expected a JSON object with {', '.join(names)}")
    others = list(_differences({key: found[key] for key in settings}, settings))
    if others:
        raise ValueError(
            f"{path}: of other settings, {', '.join(others)}; give another output"
        )
    return found


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in found | wanted:
            yield from _differences(found.get(key), wanted.get(key), key)
    elif found != wanted:
        yield f"{name} {found!r} instead of {wanted!r}"


def made_with(runs: Iterable[dict[str, Any]]) -> str:
    """The versions and devices of runs, each once."""
    versions, devices = set(), set()
    for run in runs:
        versions.add(", ".join(f"{k} {v}" for k, v in run["versions"].items()))
        devices.add(run["device"])
    return f"{'; '.join(sorted(versions))}, on {', '.join(sorted(devices))}"


def publish(
    results: dict[str, Any],
    output: Path,
    table: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Writes the table beside the numbers, and a plot if given. Prints the table."""
    text = table(results)
    output.with_suffix(".md").write_text(text)
    if plot is not None:
        plot(results, output.with_suffix(".png"))
    print(text)
