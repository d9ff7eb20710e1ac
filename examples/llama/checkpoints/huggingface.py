"""Hugging Face checkpoints of Llamas: config.json and safetensors, read and written.

Tensors have Hugging Face's names and, for kernels, its order [out, in]. Nothing here
unpickles or runs code from a checkpoint.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from examples.gguf_files import is_gguf, read_header
from examples.llama.checkpoints.directories import (
    SUMS,
    TOKENIZER,
    check_directory,
    save_directory,
)
from examples.llama.checkpoints.gguf_config import token_ids
from examples.llama.checkpoints.huggingface_config import (
    from_hugging_face,
    to_hugging_face,
)
from examples.llama.checkpoints.safetensors_files import (
    DTYPES,
    Tensor,
    list_tensors,
    read_json,
    read_tensor,
    write_tensors,
)
from examples.llama.checkpoints.tensors import (
    check_tensors,
    expected_parameters,
    file_shapes,
    file_tensors,
    is_kernel,
    plain_parameters,
)
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama
from examples.llama.model.parameters import (
    Sharding,
    build,
)

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What a saved model's directory holds, the tokenizer's files included.
OURS = re.compile(
    r"(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors"
    rf"|model\.safetensors\.index\.json|{TOKENIZER}|{SUMS}"
)
WHAT = "a model"


def load_hugging_face(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    sharding: Sharding | None = None,
) -> Llama:
    """Loads a directory with config.json and safetensors, in one file or several.

    Every tensor is checked before the first is read. They are read one at a time, and
    of each only the parts that this process's devices hold.

    Args:
      path: The directory.
      dtype: The model's compute dtype.
      param_dtype: The dtype that the weights are cast to.
      sharding: A function of a parameter's name ("layers.0.mlp.up_proj.kernel") and
        shape that returns where it goes; None is JAX's default device.

    Raises:
      ValueError: A file is absent, damaged or a pickle, the configuration is not one
        that `Llama` implements, or the tensors are not those that it calls for.
    """
    path = Path(path)
    tensors = list_tensors(path)
    values = read_json(path / CONFIG)
    try:
        config = from_hugging_face(values)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from None
    if config.num_hidden_layers > len(tensors):  # nor build so many to compare
        raise ValueError(
            f"{path / CONFIG}: num_hidden_layers is {config.num_hidden_layers}, but "
            f"{path} holds {len(tensors)} tensors in all"
        )
    shapes = tensor_shapes(config)
    _check(path, tensors, shapes, config.tie_word_embeddings)

    def read(parameter: str, index: tuple[slice, ...]) -> np.ndarray:
        kernel = is_kernel(parameter)
        name = tensor_name(parameter)
        part = index[::-1] if kernel else index
        piece = read_tensor(tensors[name].file, name, part)
        return piece.T if kernel else piece

    return build(config, read, dtype, param_dtype, sharding)


def tensor_name(parameter: str) -> str:
    """Hugging Face's name of our "layers.0.mlp.up_proj.kernel", say."""
    name = parameter.rpartition(".")[0] + ".weight"
    return name if name == HEAD else f"model.{name}"


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors by Hugging Face's names, in our order."""
    return _named(expected_parameters(config))


def _named(params: Mapping[str, jax.Array]) -> dict[str, tuple[int, ...]]:
    return {tensor_name(name): shape for name, shape in file_shapes(params).items()}


def _check(
    directory: Path,
    tensors: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    tied: bool,
) -> None:
    """Raises ValueError unless the tensors are those of `shapes`."""
    if tied and HEAD in tensors:
        shapes = shapes | {HEAD: shapes[EMBEDDING]}
    held = {  # but for what follows from the configuration, in old files
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    found = {name: (tensor.file, tensor.shape) for name, tensor in held.items()}
    check_tensors(directory, found, shapes, "config.json")
    for name, (file, _, dtype) in held.items():
        if dtype not in DTYPES.values():
            allowed = ", ".join(DTYPES.values())
            raise ValueError(
                f"{file}: tensor {name} has dtype {dtype}, expected one of {allowed}"
            )
    if tied and HEAD in tensors:
        count = shapes[EMBEDDING][0]
        for start in range(0, count, 4096):
            rows = (slice(start, min(start + 4096, count)),)
            head, embedding = (
                read_tensor(tensors[name].file, name, rows)
                for name in (HEAD, EMBEDDING)
            )
            if not np.array_equal(head.astype("f4"), embedding.astype("f4")):
                raise ValueError(
                    f"{tensors[HEAD].file}: tensor {HEAD} differs from {EMBEDDING}, "
                    "but tie_word_embeddings is true in config.json"
                )


def save_hugging_face(
    model: Llama,
    directory: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    source: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that transformers, vLLM and `load_hugging_face` load.

    All of it is written beside `directory` and renamed at the end. A process killed on
    the way leaves the model that was there before, or, if it dies between the two
    renames, has it under the name ``.{directory}.previous``. Tensors are gathered one
    at a time. Where there are several processes, all of them must call this; the first
    writes, and all return when it has.

    Args:
      model: The model. LoRA must have been merged.
      directory: Where to. A model that was saved here before is replaced whole, also
        the tokenizer beside it.
      dtype: float32, bfloat16 or float16, which the weights are cast to; None keeps
        the parameters' own.
      source: The directory or file that the model was loaded from, whose token ids
        (bos, eos, pad) and generation_config.json are carried over. Without it, and
        from llama2.c's, readers take their own default, the ids of Llama 2.
      max_shard_bytes: Of tensors in a file; a larger tensor has a file of its own.

    Raises:
      ValueError: An argument is outside these limits, or `directory` holds something
        other than a model saved here.
    """
    directory = Path(directory).resolve()
    params = plain_parameters(model)
    given = [x.dtype for x in params.values()] if dtype is None else [dtype]
    names = sorted({np.dtype(x).name for x in given})
    if len(names) > 1 or names[0] not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise ValueError(f"dtype must be one of {allowed}; got {', '.join(names)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be 1 or above, got {max_shard_bytes}")
    stored = np.dtype(given[0])

    tensors = file_tensors(params, stored)

    def write(staging: Path) -> None:
        config = to_hugging_face(model.config) | {"torch_dtype": stored.name}
        _write_config(staging, config, None if source is None else Path(source))
        shapes = _named(params)
        write_tensors(staging, shapes, stored, tensors, max_shard_bytes)

    save_directory(directory, tensors, write, ours=OURS, what=WHAT)


def _write_config(staging: Path, config: dict[str, Any], source: Path | None) -> None:
    if source is not None and is_gguf(source):
        config = config | token_ids(read_header(source))
    elif source is not None and not source.is_file():  # llama2.c has none of it
        values = read_json(source / CONFIG)
        config = config | {key: values[key] for key in TOKEN_IDS if key in values}
        if (source / GENERATION_CONFIG).is_file():
            shutil.copyfile(source / GENERATION_CONFIG, staging / GENERATION_CONFIG)
    (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def check_destination(directory: str | os.PathLike[str]) -> None:
    """Raises ValueError where `save_hugging_face` could not write `directory`."""
    check_directory(directory, OURS, WHAT)
