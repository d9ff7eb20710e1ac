"""Files of safetensors, such as those of a Hugging Face checkpoint, one or several.

Tensors are read and written one at a time, whatever the size of a file.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# In the header of every file written here; transformers looks for the format.
METADATA = {"format": "pt", "writer": "mofo_jax"}


class Tensor(NamedTuple):
    """What a file's header says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint; ValueError where it is absent or something else."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: not a Hugging Face model, no {path.name}")
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def list_tensors(directory: Path) -> dict[str, Tensor]:
    """What a checkpoint's files hold, by name; nothing is read but their headers.

    Raises:
      ValueError: A file is absent, damaged or a pickle, or the index is wrong.
    """
    if (directory / WEIGHTS).is_file():
        return read_header(directory / WEIGHTS)
    index = directory / INDEX
    if not index.is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
        hint = f": {pickles[0]} is a pickle, which is never opened" if pickles else ""
        raise ValueError(
            f"{directory}: expected {WEIGHTS}, or {INDEX} and its files{hint}"
        )
    content = read_json(index)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index}: weight_map must name each tensor's file")
    found: dict[str, Tensor] = {}
    for name, file in listed.items():
        # A path could lead anywhere, and so could what is no plain file.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ValueError(
                f"{index}: file of {name} must be a .safetensors beside it, named in "
                f"letters, digits, _, . and -, got {file!r}"
            )
        if not (directory / file).is_file():
            raise ValueError(f"{index}: lists {file}, which is not there")
    for file in sorted(set(listed.values())):
        for name, tensor in read_header(directory / file).items():
            if listed.get(name) != file:
                raise ValueError(
                    f"{directory / file}: holds tensor {name}, which {INDEX} has in "
                    f"{listed.get(name)}"
                )
            found[name] = tensor
    for name in listed:
        if name not in found:
            raise ValueError(
                f"{directory / listed[name]}: no tensor {name}, which {INDEX} has there"
            )
    return found


def read_header(file: Path) -> dict[str, Tensor]:
    """What one file holds, by name; ValueError where it is damaged."""
    found = {}
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118, it is no mapping
            entry = tensors.get_slice(name)
            shape = tuple(entry.get_shape())
            found[name] = Tensor(file, shape, entry.get_dtype())
    return found


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that a file's header holds by name; ValueError where it is damaged."""
    with _opened(file) as tensors:
        return tensors.metadata() or {}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(
            f"{file}: not safetensors, or damaged: {error}{_where_cut(file)}"
        ) from None


def _where_cut(file: Path) -> str:
    """The first tensor that a truncated file does not hold to its end, if it is one."""
    size = file.stat().st_size
    with file.open("rb") as data:
        start = 8 + int.from_bytes(data.read(8), "little")
        header = data.read(start - 8) if start <= size else b""
    try:
        ends = {
            name: start + entry["data_offsets"][1]
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        }
        end, name = min((end, name) for name, end in ends.items() if end > size)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return ""
    return f": {size} bytes, but tensor {name} ends at byte {end}"


def read_tensor(file: Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """The part [index] of a tensor, in the dtype of the file."""
    # Opened each time, because pages of a mapped file count as ours while it is open.
    try:
        with safe_open(file, framework="numpy") as tensors:
            return tensors.get_slice(name)[index]
    except SafetensorError as error:
        raise ValueError(f"{file}: tensor {name}: {error}") from None


def write_file(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterator[np.ndarray],
    metadata: Mapping[str, str] = METADATA,
) -> None:
    """Writes one new file; safetensors' own writer would need all of it in memory.

    Args:
      file: Where to; nothing is there yet.
      shapes: Of the tensors, by name.
      dtype: Of all of them, float32, bfloat16 or float16.
      tensors: As many as `shapes`, in its order, are taken one by one.
      metadata: What `read_metadata` returns.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": DTYPES[dtype.name],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with file.open("xb") as data:
        data.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            tensor = next(tensors)
            assert tensor.shape == shape and tensor.dtype == dtype
            data.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def write_tensors(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[np.ndarray],
    max_bytes: int,
) -> None:
    """Writes model.safetensors, or files of up to `max_bytes` and their index.

    Args:
      directory: Where to; it has no such files yet.
      shapes: Of the tensors, by name.
      dtype: Of all of them, float32, bfloat16 or float16.
      tensors: In the order of `shapes`; one is asked for when the last is written.
      max_bytes: Of tensors in a file; a larger tensor has a file of its own.
    """
    sizes = {name: dtype.itemsize * math.prod(s) for name, s in shapes.items()}
    parts: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            parts.append([])
            room = max_bytes
        parts[-1].append(name)
        room -= size
    weight_map: dict[str, str] = {}
    remaining = iter(tensors)
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        file = WEIGHTS if len(parts) == 1 else file
        part = {name: shapes[name] for name in names}
        write_file(directory / file, part, dtype, remaining)
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        total = {"total_size": sum(sizes.values())}
        index = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2)
        (directory / INDEX).write_text(index + "\n")


def written_here(file: Path) -> bool:
    """Whether `write_tensors` wrote a file."""
    try:
        return read_metadata(file) == METADATA
    except ValueError:
        return False
