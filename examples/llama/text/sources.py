"""What names records: files, directories, patterns, data sets, and their weights."""

import glob
import math
import os
from pathlib import Path
from typing import NamedTuple

HUB = "hf:"  # before the name of a data set


class Source(NamedTuple):
    """Where records come from, and how much they weigh among those of other sources."""

    path: str  # a file, or hf:NAME
    weight: float


def parse_source(text: str) -> Source:
    """The source that "FILE:WEIGHT" names.

    Without a number at the end the weight is 1. A name that itself ends in a colon
    and a number needs a weight behind it.

    Raises:
      ValueError: There is no name, or the weight is not above 0 and finite.
    """
    name, colon, end = text.rpartition(":")
    try:
        weight = float(end) if colon else math.nan
    except ValueError:
        colon = ""
    if not colon:
        name, weight = text, 1.0
    if not name.strip():
        raise ValueError(f"{text!r} names no file; expected FILE or FILE:WEIGHT")
    if not 0 < weight < math.inf:
        raise ValueError(f"{text!r} has weight {end}; expected one above 0, and finite")
    return Source(name, weight)


def find_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of records that a path names, in the order in which they are read.

    That is one file; or in a directory all files called .jsonl or .json; or the files
    that a pattern such as "shards/*.jsonl" finds. Several come in the order of their
    names. Of "hf:NAME" there is none.

    Raises:
      OSError: There is no such file or directory.
      ValueError: No file is found.
    """
    name, path = os.fspath(path), Path(path)
    if name.startswith(HUB):
        return []
    if path.is_dir():
        found = [x for x in path.iterdir() if x.suffix.lower() in (".jsonl", ".json")]
        missing = "no file called .jsonl or .json in it"
    elif glob.has_magic(name) and not path.exists():
        found = [Path(x) for x in glob.glob(name)]
        missing = "no file fits this pattern"
    else:
        path.stat()  # the error names the file
        return [path]
    if not (files := sorted(x for x in found if x.is_file())):
        raise ValueError(f"{name}: {missing}; expected files of records")
    return files
