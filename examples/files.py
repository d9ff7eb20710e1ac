"""JSON that is checked, and files that are written whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object; OSError or ValueError, which name the file, for anything else."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; expected a JSON object") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {type(value).__name__}; expected a JSON object")
    return value


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write what becomes `path`: a reader finds the old file or the new one.

    The new file is written beside `path` and renamed at the end. After an error it is
    removed, and `path` is as it was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all; see `replacing`."""
    with replacing(path) as beside:
        beside.write_bytes(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_json_lines(path: str | os.PathLike[str], values: Iterable[Any]) -> None:
    write_bytes(path, b"".join(json.dumps(value).encode() + b"\n" for value in values))
