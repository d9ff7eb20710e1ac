"""Files of GGUF, the format of llama.cpp: what a header says, and parts of tensors.

The reader of the gguf package believes the lengths in a file, and loops and allocates
by them. Here each is compared with the size of the file first.
"""

import math
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

MAGIC = b"GGUF"
# How tensors may be stored. Those of one number at a time have a dtype.
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # of 32 numbers
SUPERBLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # of 256
KINDS = (*DTYPES, *BLOCKS, *SUPERBLOCKS)
# Numbers by their type in the file, in the letters of `struct`.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _ARRAY = 8, 9
# Far above what a model needs, and low enough to hold in memory.
_MOST = {"keys": 1 << 16, "tensors": 1 << 18, "texts of an array": 1 << 23}
# Numbers that are dequantized at a time; these fit a cache.
_CHUNK = 1 << 18


class Tensor(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]  # as NumPy has it: rows first
    kind: str  # one of KINDS
    start: int  # its first byte in the file


class Header(NamedTuple):
    """What a file says before its tensors' values."""

    path: Path
    metadata: dict[str, Any]  # numbers, texts, lists of texts, arrays of numbers
    tensors: dict[str, Tensor]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key, or `default` where the file has no such key.

        Args:
          key: Its name.
          kind: int, float, bool, str, list (texts) or np.ndarray (numbers).
          default: None makes the key one that the file must have.

        Raises:
          ValueError: It is missing, or of another type.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.path}: no key {key}")
        if type(value) is not kind and not (kind is float and type(value) is int):
            found = type(value).__name__
            raise ValueError(
                f"{self.path}: {key} must be of type {kind.__name__}, got {found}"
            )
        return value


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file is called .gguf, or begins as such a file does."""
    path = Path(path)
    return path.is_file() and (path.suffix == ".gguf" or has_magic(path))


def has_magic(file: Path) -> bool:
    """Whether a file begins as GGUF does."""
    with file.open("rb") as data:
        return data.read(len(MAGIC)) == MAGIC


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads what a file says before its tensors' values.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is no GGUF file of version 2 or 3, is damaged, or stores a tensor
        in another way than `KINDS`.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(24)
        if len(start) < 24 or start[:4] != MAGIC:
            raise ValueError(
                f"{path}: not GGUF: begins with {start[:4]!r} and has "
                f"{path.stat().st_size} bytes, expected {MAGIC!r} and 24 or more"
            )
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data, len(MAGIC))
    if (version := cursor.number("I", "the version")) not in (2, 3):
        raise ValueError(
            f"{path}: GGUF of version {version}, expected 2 or 3 (little-endian)"
        )
    count = cursor.count("tensors")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("keys")):
        key = cursor.text("a key")
        if key in metadata:
            raise ValueError(f"{path}: key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.number("I", key), key)
    entries = list(_tensor_entries(cursor, count))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(
            f"{path}: general.alignment must be a power of two, got {alignment!r}"
        )
    first = -(-cursor.place // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"{path}: tensor {name!r} occurs twice")
        tensors[name] = tensor = Tensor(shape, kind, first + offset)
        end = tensor.start + math.prod(_stored_shape(tensor))
        if offset % alignment or end > len(data):
            raise ValueError(
                f"{path}: truncated or damaged: tensor {name!r} {list(shape)} of kind "
                f"{kind} begins at byte {tensor.start} and ends at {end}, but the file "
                f"has {len(data)} bytes and an alignment of {alignment}"
            )
    return Header(path, metadata, tensors)


class _Cursor:
    """Reads one value after the other, none beyond the end."""

    def __init__(self, path: Path, data: mmap.mmap, place: int):
        self.path, self.data, self.place = path, data, place

    def skip(self, size: int, what: str) -> int:
        """Where the next `size` bytes begin; moves behind them."""
        start, self.place = self.place, self.place + size
        if self.place > len(self.data):
            raise ValueError(
                f"{self.path}: truncated: {what} ends at byte {self.place}, but the "
                f"file has {len(self.data)} bytes"
            )
        return start

    def number(self, letter: str, what: str) -> Any:
        start = self.skip(struct.calcsize(letter), what)
        return struct.unpack_from(f"<{letter}", self.data, start)[0]

    def count(self, what: str) -> int:
        found = self.number("Q", f"the number of {what}")
        if found > _MOST[what]:
            raise ValueError(
                f"{self.path}: {found} {what}, expected at most {_MOST[what]}"
            )
        return found

    def text(self, what: str) -> str:
        size = self.number("Q", what)
        start = self.skip(size, what)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {what} is not UTF-8: {error}") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _TEXT:
            return self.text(key)
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], key)
        if kind == _ARRAY:
            kind = self.number("I", key)
            if kind == _TEXT:
                return [self.text(key) for _ in range(self.count("texts of an array"))]
            if kind in _NUMBERS:
                count, dtype = self.number("Q", key), np.dtype(f"<{_NUMBERS[kind]}")
                start = self.skip(count * dtype.itemsize, key)
                return np.frombuffer(self.data, dtype, count, start)
        raise ValueError(
            f"{self.path}: {key} has values of type {kind}, expected numbers (0 to 7, "
            f"10 to 12), texts ({_TEXT}), or an array ({_ARRAY}) of these"
        )


def _tensor_entries(
    cursor: _Cursor, count: int
) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """Each tensor's name, shape, kind and offset."""
    for _ in range(count):
        name = cursor.text("the name of a tensor")
        what = f"tensor {name!r}"
        dimensions = cursor.number("I", what)
        if not 1 <= dimensions <= 4:
            raise ValueError(
                f"{cursor.path}: {what} has {dimensions} dimensions, expected 1 to 4"
            )
        shape = tuple(cursor.number("Q", what) for _ in range(dimensions))[::-1]
        number = cursor.number("I", what)
        try:
            kind = GGMLQuantizationType(number).name
        except ValueError:
            kind = str(number)
        if kind not in KINDS:
            raise ValueError(
                f"{cursor.path}: {what} is stored as {kind}, expected one of "
                f"{', '.join(KINDS)}"
            )
        block = GGML_QUANT_SIZES[GGMLQuantizationType(number)][0]
        if 0 in shape or shape[-1] % block:
            raise ValueError(
                f"{cursor.path}: {what} has shape {list(shape)}, expected rows of a "
                f"multiple of {block} numbers for {kind}, and none empty"
            )
        yield name, shape, kind, cursor.number("Q", what)


def _stored_shape(tensor: Tensor) -> tuple[int, int]:
    """Rows, and the bytes of each."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.kind]]
    return math.prod(tensor.shape[:-1]), tensor.shape[-1] // block * size


def read_rows(
    path: Path, tensor: Tensor, rows: slice | np.ndarray = slice(None)
) -> np.ndarray:
    """Rows of a matrix, or a vector as one row: [rows, columns].

    What is quantized becomes float32; the rest keeps its dtype.

    Args:
      path: The file.
      tensor: What its header says of the tensor.
      rows: Which of them; their numbers in any order.
    """
    # Opened each time, because pages of a mapped file count as ours while it is open.
    mapped = np.memmap(path, np.uint8, "r", tensor.start, _stored_shape(tensor))
    stored = np.asarray(mapped)[rows]
    if tensor.kind in DTYPES:
        return stored.view(DTYPES[tensor.kind])
    values = np.empty((len(stored), tensor.shape[-1]), np.float32)
    step = max(1, _CHUNK // tensor.shape[-1])
    # A damaged scale may be infinite or no number.
    with np.errstate(all="ignore"):
        for i in range(0, len(stored), step):
            # As one long row; the package would go through rows in groups of 16.
            part = stored[i : i + step].reshape(1, -1)
            whole = dequantize(part, GGMLQuantizationType[tensor.kind])
            values[i : i + step] = whole.reshape(-1, tensor.shape[-1])
    return values
