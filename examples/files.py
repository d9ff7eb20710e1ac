"""JSON that is checked, files written whole or not at all, and directories locked."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
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

    The new file is written beside `path` and renamed once the disk has it, so that this
    holds after a power failure too. After an error it is removed, and `path` is as it
    was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # from a write
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        beside.unlink(missing_ok=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Waits until the disk has a file's content, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | os.PathLike[str]) -> str:
    """The digest of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LOCK = ".lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other processes from a directory, which is made, while in the block.

    The kernel releases the lock when the process ends, however it does. Where the file
    system knows no locks, there is none. An empty directory that this made is removed
    at the end.

    Raises:
      ValueError: Another process has the lock; the message names it and its host.
      OSError: The directory cannot be made.
    """
    made = [p for p in (directory, *directory.parents) if not p.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    try:
        descriptor = lock(path, directory)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock goes, while it is ours
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):  # of the first that is not empty
            for parent in made:
                parent.rmdir()


def lock(path: Path, output: Path) -> int:
    """Locks a file, which is made, for as long as its descriptor is open.

    Args:
      path: The file.
      output: What it keeps from other processes, for the error.

    Returns:
      The descriptor. Remove the file before you close it.

    Raises:
      ValueError: Another process has the lock; the message names it and its host.
      OSError: The file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _is_locked(descriptor, path, output):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_locked(descriptor: int, path: Path, output: Path) -> bool:
    """Locks an open file; False if its owner before removed it in the meantime."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            return True
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        owner = os.read(descriptor, 200).decode(errors="replace").strip()
        raise ValueError(
            f"{output}: {owner or 'another process'} is writing there; wait "
            "until it has ended, or give another output"
        ) from None
    if not (path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())):
        return False
    with contextlib.suppress(OSError):  # the lock counts, the name is a convenience
        os.truncate(descriptor, 0)
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        os.write(descriptor, owner.encode())
    return True


@contextlib.contextmanager
def waiting(path: Path) -> Iterator[bool]:
    """Waits until no other process is in the block with the same file, which is made.

    Gives False where the file system knows no locks.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            locked = False
        else:
            locked = True
        yield locked


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all; see `replacing`."""
    with replacing(path) as beside:
        beside.write_bytes(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_json_lines(path: str | os.PathLike[str], values: Iterable[Any]) -> None:
    write_bytes(path, b"".join(json.dumps(value).encode() + b"\n" for value in values))
