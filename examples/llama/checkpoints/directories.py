"""Directories of a checkpoint's files, written whole or not at all."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.checks import check_writable
from examples.files import sha256, sync, write_bytes
from examples.llama.checkpoints.safetensors_files import written_here

TOKENIZER = r"tokenizer(_config)?\.json|special_tokens_map\.json|chat_template\.jinja"
SUMS = "SHA256SUMS"  # what `sha256sum --check` reads


def gathered(arrays: Iterable[jax.Array], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Each array whole, on the host. All processes take part."""
    for x in arrays:
        if x.is_fully_addressable:
            # A copy, because an array keeps what it was once read as on the host.
            array = np.asarray(x.copy())
        else:
            array = multihost_utils.process_allgather(x, tiled=True)
        yield array.astype(dtype, copy=False)


def save_directory(
    directory: Path,
    tensors: Iterator[np.ndarray],
    write: Callable[[Path], None],
    *,
    ours: re.Pattern[str],
    what: str,
) -> None:
    """Has the first process write a directory; all return when it has.

    It is written beside `directory` and renamed at the end. A process killed on the way
    leaves what was there before, or, if it dies between the two renames, has it under
    the name ``.{directory}.previous``.

    Args:
      directory: Where to.
      tensors: From `gathered`, which `write` goes through.
      write: Writes the files into an empty directory.
      ours, what: See `check_directory`.

    Raises:
      ValueError, OSError: The directory could not be written.
    """
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            with _replacing(directory, ours, what) as staging:
                write(staging)
        except (OSError, ValueError) as error:
            failure = error
    if jax.process_count() > 1:
        for _ in tensors:  # each process takes part in gathering, whatever happened
            pass
        saved = multihost_utils.broadcast_one_to_all(np.array(failure is None))
        if failure is None and not saved:
            failure = ValueError(f"{directory}: the first process could not save there")
    if failure is not None:
        raise failure


def check_directory(
    directory: str | os.PathLike[str], ours: re.Pattern[str], what: str
) -> None:
    """Raises ValueError where `save_directory` could not write `directory`.

    That is where it holds other files than those whose names match `ours`, which are
    those of `what`, "a model", or where its tensors were not written here.
    """
    directory = Path(directory).absolute()
    check_writable(directory, directory.parent)
    if directory.exists():
        files = sorted(directory.iterdir()) if directory.is_dir() else [directory]
        weights = [file for file in files if file.suffix == ".safetensors"]
        odd = [file for file in files if not ours.fullmatch(file.name)]
        odd += [file for file in weights if not written_here(file)]
        if files and (odd or not weights):
            reason = f": {odd[0].name}" if odd else ""
            raise ValueError(
                f"{directory}: not overwritten, it is neither an empty directory nor "
                f"one that {what} alone was saved to{reason}"
            )


@contextlib.contextmanager
def _replacing(directory: Path, ours: re.Pattern[str], what: str) -> Iterator[Path]:
    """A new directory that takes the place of `directory`, if that is one of ours."""
    staging = directory.with_name(f".{directory.name}.saving")
    previous = directory.with_name(f".{directory.name}.previous")
    check_directory(directory, ours, what)
    shutil.rmtree(staging, ignore_errors=True)  # of a process killed on the way
    staging.mkdir(parents=True)
    try:
        yield staging
    except (OSError, ValueError):
        shutil.rmtree(staging, ignore_errors=True)  # gives a full disk its space back
        raise
    for file in staging.iterdir():
        sync(file)
    sync(staging)
    if directory.exists():
        shutil.rmtree(previous, ignore_errors=True)
        directory.rename(previous)
    staging.rename(directory)
    sync(directory.parent)
    shutil.rmtree(previous, ignore_errors=True)


def write_sums(directory: Path) -> None:
    """Writes the digests of a directory's files, for `sha256sum --check SHA256SUMS`."""
    files = sorted(x for x in directory.iterdir() if x.is_file() and x.name != SUMS)
    lines = [f"{sha256(file)}  {file.name}\n" for file in files]
    write_bytes(directory / SUMS, "".join(lines).encode())
