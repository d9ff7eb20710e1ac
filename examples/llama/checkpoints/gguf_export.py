"""Write a Llama as a GGUF file, for llama.cpp and Ollama."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
)
from gguf.quants import quantize

from examples.checks import check_name, check_writable
from examples.files import replacing, write_bytes
from examples.gguf_files import has_magic
from examples.llama.checkpoints.gguf_config import (
    ARCHITECTURE,
    ROPE_FACTORS,
    is_rotated,
    pairs_beside,
    rope_factors,
    tensor_name,
    to_gguf,
)
from examples.llama.checkpoints.ollama import modelfile
from examples.llama.checkpoints.tensors import (
    file_shapes,
    file_tensors,
    plain_parameters,
)
from examples.llama.model.llama import Llama
from examples.llama.text.gguf_vocabulary import vocabulary_metadata
from examples.llama.text.tokenizer import Tokenizer

MODELFILE = "Modelfile"
Kind = Literal["F32", "F16", "BF16", "Q8_0"]
KINDS = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def save_gguf(
    model: Llama,
    tokenizer: Tokenizer,
    path: str | os.PathLike[str],
    *,
    kind: Kind = "F16",
) -> None:
    """Writes a GGUF file, and beside it a Modelfile for ``ollama create``.

    The file is written beside `path` and renamed at the end. Tensors are gathered one
    at a time.

    Args:
      model: The model. LoRA must have been merged.
      tokenizer: Its tokenizer, which goes into the file with its chat template.
      path: Where to, a name with .gguf at the end. A GGUF file there is replaced, with
        the Modelfile that is its own.
      kind: How matrices are stored. Vectors are F32. With Q8_0, so are matrices in F16
        whose rows are no multiple of 32.

    Raises:
      OSError: The file cannot be written.
      ValueError: An argument is outside these limits, GGUF cannot express the
        tokenizer, or something else is at `path`.
    """
    path = Path(path).absolute()
    check_name("kind", kind, KINDS)
    check_gguf_destination(path)
    params = plain_parameters(model)
    metadata = {
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": int(KINDS[kind]),
        "general.quantization_version": GGML_QUANT_VERSION,
        **to_gguf(model.config),
        **vocabulary_metadata(tokenizer, model.config.vocab_size),
    }
    # Each tensor's name, shape and kind, and then their values in this order.
    entries: list[tuple[str, tuple[int, ...], str]] = []
    if model.config.rope_scaling is not None:
        entries.append((ROPE_FACTORS, (model.config.head_size // 2,), "F32"))
    for name, shape in file_shapes(params).items():
        entries.append((tensor_name(name), shape, _kind_of(shape, kind)))

    def values() -> Iterator[np.ndarray]:
        if model.config.rope_scaling is not None:
            yield rope_factors(model.config)
        arrays = file_tensors(params, np.dtype(np.float32))
        for name, array in zip(params, arrays, strict=True):
            if is_rotated(name):
                array = array[pairs_beside(len(array), model.config.head_size)]
            yield array

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        _write(beside, metadata, entries, values())
    content = modelfile(tokenizer, path.name)
    write_bytes(path.with_name(MODELFILE), content.encode())


def check_gguf_destination(path: str | os.PathLike[str]) -> None:
    """Raises ValueError where `save_gguf` could not write `path`."""
    path = Path(path).absolute()
    if path.suffix != ".gguf":
        raise ValueError(f"{path}: expected a name with .gguf at the end")
    check_writable(path, path.parent)
    if path.exists() and not (path.is_file() and has_magic(path)):
        raise ValueError(f"{path}: not overwritten, it is no GGUF file")
    other = path.with_name(MODELFILE)
    if other.exists():
        lines = other.read_bytes().splitlines() if other.is_file() else []
        if lines[:1] != [f"FROM ./{path.name}".encode()]:
            raise ValueError(f"{other}: not overwritten, it is not that of {path.name}")


def _kind_of(shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % 32 else kind


def _write(
    path: Path,
    metadata: dict[str, Any],
    entries: list[tuple[str, tuple[int, ...], str]],
    values: Iterator[np.ndarray],
) -> None:
    """Writes a whole file; `values` are taken one by one."""
    writer = GGUFWriter(path, ARCHITECTURE)
    adders: dict[type, Callable[[str, Any], None]] = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        adders[type(value)](key, value)
    for name, shape, kind in entries:
        number = GGMLQuantizationType[kind]
        block, size = GGML_QUANT_SIZES[number]
        stored = (*shape[:-1], shape[-1] // block * size)
        writer.add_tensor_info(
            name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=number
        )
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (_, _, kind), array in zip(entries, values, strict=True):
            writer.write_tensor_data(_stored(array, kind))


def _stored(array: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of float32 values."""
    if kind == "Q8_0":
        return quantize(np.ascontiguousarray(array), GGMLQuantizationType.Q8_0)
    dtype = {"F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}[kind]
    return np.ascontiguousarray(array.astype(dtype)).view(np.uint8)
