"""Load a Llama from a GGUF file of llama.cpp, also a quantized one."""

import os

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from examples.gguf_files import Header, read_header, read_rows
from examples.llama.checkpoints.gguf_config import (
    ROPE_FACTORS,
    from_gguf,
    is_rotated,
    pairs_beside,
    tensor_name,
)
from examples.llama.checkpoints.tensors import (
    check_tensors,
    expected_parameters,
    file_shapes,
    is_kernel,
)
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama
from examples.llama.model.parameters import Sharding, build


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    sharding: Sharding | None = None,
) -> Llama:
    """Loads a GGUF file; what is quantized in it becomes plain numbers.

    Every tensor is checked before the first is read. They are read one at a time, and
    of each only the rows that this process's devices hold.

    Args:
      path: The file.
      dtype: The model's compute dtype.
      param_dtype: The dtype that the weights are cast to.
      sharding: See `loading.load_model`.

    Raises:
      OSError: The file cannot be read.
      ValueError: The file is damaged, the model is not one that `Llama` implements, or
        the tensors are not those that the metadata calls for.
    """
    header = read_header(path)
    config = from_gguf(header)
    if config.num_hidden_layers > len(header.tensors):  # nor build so many to compare
        raise ValueError(
            f"{path}: llama.block_count is {config.num_hidden_layers}, but the file "
            f"holds {len(header.tensors)} tensors in all"
        )
    _check(header, config)

    def read(parameter: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = header.tensors[tensor_name(parameter)]
        if len(tensor.shape) == 1:
            return read_rows(header.path, tensor)[0][index]
        if not is_kernel(parameter):
            return read_rows(header.path, tensor, index[0])[:, index[1]]
        columns, rows = index
        if not is_rotated(parameter):
            return read_rows(header.path, tensor, rows)[:, columns].T
        ours = np.argsort(pairs_beside(tensor.shape[0], config.head_size))
        return read_rows(header.path, tensor, ours[rows])[:, columns].T

    return build(config, read, dtype, param_dtype, sharding)


def _check(header: Header, config: LlamaConfig) -> None:
    """Raises ValueError unless the tensors are those of `config`."""
    expected = file_shapes(expected_parameters(config))
    shapes = {tensor_name(name): shape for name, shape in expected.items()}
    found = {
        name: (header.path, tensor.shape)
        for name, tensor in header.tensors.items()
        if name != ROPE_FACTORS
    }
    check_tensors(header.path, found, shapes, "the metadata")
