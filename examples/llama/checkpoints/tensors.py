"""The tensors of a Llama as files have them: kernels as [out, in], not [in, out]."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from examples.llama.checkpoints.directories import gathered
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama
from examples.llama.model.parameters import abstract_model, named_parameters


def is_kernel(parameter: str) -> bool:
    """Whether files have a parameter of this name transposed."""
    return parameter.endswith(".kernel")


def expected_parameters(config: LlamaConfig) -> dict[str, jax.Array]:
    """What stands for a model's parameters, by name; nothing is allocated."""
    return named_parameters(abstract_model(config, jnp.float32, jnp.float32)[1])


def file_shapes(params: Mapping[str, jax.Array]) -> dict[str, tuple[int, ...]]:
    """The shapes that files have, by our names of the parameters."""
    return {
        name: like.shape[::-1] if is_kernel(name) else like.shape
        for name, like in params.items()
    }


def check_tensors(
    place: Path,
    found: Mapping[str, tuple[Path, tuple[int, ...]]],
    expected: Mapping[str, tuple[int, ...]],
    by: str,
) -> None:
    """Raises ValueError unless the tensors are those expected, naming what is wrong.

    Args:
      place: Where they are, to name what is missing.
      found: The file and the shape of each tensor.
      expected: Their shapes.
      by: What these follow from, such as "config.json".
    """
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(
                f"{place}: no tensor {name} {list(shape)}, which {by} calls for"
            )
    for name, (file, shape) in found.items():
        if name not in expected:
            raise ValueError(
                f"{file}: tensor {name} is surplus, {by} calls for no such one"
            )
        if shape != expected[name]:
            raise ValueError(
                f"{file}: tensor {name} has shape {list(shape)}, expected "
                f"{list(expected[name])} by {by}"
            )


def plain_parameters(model: Llama) -> dict[str, jax.Array]:
    """The parameters by name; ValueError where they are not those of the config."""
    params, plain = named_parameters(model), expected_parameters(model.config)
    for name in sorted(params.keys() | plain.keys()):
        found, expected = (
            x[name].shape if name in x else None for x in (params, plain)
        )
        if found != expected:
            raise ValueError(
                f"model: shape of {name} is {found}, expected {expected} by its config"
            )
    return params


def file_tensors(params: dict[str, jax.Array], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Each parameter whole, as files have it."""
    arrays = gathered(params.values(), dtype)
    for name, array in zip(params, arrays, strict=True):
        yield array.T if is_kernel(name) else array
