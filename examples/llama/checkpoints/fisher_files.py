"""The Fisher information of a model as one file of safetensors.

A tensor has the name of its parameter ("layers.0.mlp.up_proj.kernel"). If it is
factored, there are two instead, NAME/rows and NAME/columns. All are float32.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from examples.checks import check_writable
from examples.files import replacing
from examples.llama.checkpoints.safetensors_files import (
    Tensor,
    read_header,
    read_metadata,
    read_tensor,
    write_file,
)
from examples.llama.model.parameters import Sharding, named_parameters, parameter_name
from mofo_jax.continual import FactoredFisher

FORMAT, VERSION = "mofo_jax.fisher", "1"
COMMAND = "python -m examples.llama.fisher"


class Origin(NamedTuple):
    """How the texts were drawn that a Fisher information comes from."""

    model: str  # the name of its file or directory, which drew them
    texts: int  # how many
    max_length: int  # tokens of the longest possible text
    seed: int
    temperature: float = 1.0


def save_fisher(path: Path, fisher: Any, origin: Origin) -> None:
    """Writes a file; what was there is replaced once the new one is complete.

    Args:
      path: The file. Its directory is made where there is none.
      fisher: Of all parameters of a model, dense or factored, whole in this process.
      origin: What `load_fisher` returns with it.

    Raises:
      ValueError: An entry is not finite, or below 0.
      OSError: The file cannot be written.
    """
    tensors = {
        name: np.asarray(part, np.float32)
        for parameter, leaf in named_fisher(fisher).items()
        for name, part in _parts(parameter, leaf).items()
    }
    for name, tensor in tensors.items():
        _check_values(f"fisher: tensor {name}", tensor)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "version": VERSION}
    metadata |= {name: str(value) for name, value in origin._asdict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        values = iter(tensors.values())
        write_file(beside, shapes, np.dtype(np.float32), values, metadata)


def load_fisher(
    path: Path, params: nnx.State, sharding: Sharding
) -> tuple[Any, Origin]:
    """Reads a file of `save_fisher`. Every tensor is checked before the first is read.

    Args:
      path: The file.
      params: All parameters of the model, or their shapes.
      sharding: A function of a tensor's name and shape that returns where it goes; see
        `examples.llama.model.sharding.fisher_sharding`.

    Returns:
      The Fisher information, a tree like `params`, and where it comes from.

    Raises:
      ValueError: It is no such file, or damaged; or it is of another model.
      OSError: It cannot be read.
    """
    origin = read_origin(path)
    tensors = read_header(path)

    def read(name: str) -> jax.Array:
        shape = tensors[name].shape

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            whole = (slice(None),) * len(shape)
            values = read_tensor(path, name, whole if index is None else index)
            _check_values(f"{path}: tensor {name}", values)
            return values

        return jax.make_array_from_callback(shape, sharding(name, shape), part)

    names = [
        _find(path, tensors, name, like.shape)
        for name, like in named_parameters(params).items()
    ]
    surplus = sorted(tensors.keys() - {part for parts in names for part in parts})
    if surplus:
        raise ValueError(
            f"{path}: tensor {surplus[0]} is surplus: the model has no such parameter, "
            "or the file has it in another form too"
        )
    leaves = [
        FactoredFisher(*map(read, parts)) if len(parts) > 1 else read(parts[0])
        for parts in names
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves), origin


def read_origin(path: Path) -> Origin:
    """Where the Fisher information in a file comes from.

    Raises:
      ValueError: It is no file of `save_fisher`, or damaged.
      OSError: It cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format must be {FORMAT}, as {COMMAND} writes it, got "
            f"{metadata.get('format')!r}"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path}: version must be {VERSION}, got {metadata.get('version')!r}"
        )
    values = {}
    for name, kind in Origin.__annotations__.items():
        try:
            values[name] = kind(metadata[name])
        except (KeyError, ValueError):
            raise ValueError(
                f"{path}: {name} must be of type {kind.__name__} in the header, got "
                f"{metadata.get(name)!r}"
            ) from None
    return Origin(**values)


def check_destination(path: Path) -> None:
    """Raises ValueError where `save_fisher` could not or should not write `path`."""
    check_writable(path, path.absolute().parent)
    if path.exists():
        try:
            read_origin(path)
        except (OSError, ValueError):
            raise ValueError(
                f"{path}: not overwritten, it is no file of {COMMAND}"
            ) from None


def named_fisher(fisher: Any) -> dict[str, Any]:
    """The leaves, each an array or a `FactoredFisher`, by their parameters' names."""
    leaves = jax.tree.leaves_with_path(
        nnx.to_pure_dict(fisher), is_leaf=lambda x: isinstance(x, FactoredFisher)
    )
    return {parameter_name(path): leaf for path, leaf in leaves}


def _parts(name: str, leaf: Any) -> dict[str, Any]:
    """What a file has of one leaf, by the tensors' names."""
    if not isinstance(leaf, FactoredFisher):
        return {name: leaf}
    return {f"{name}/{part}": x for part, x in leaf._asdict().items()}


def _find(
    path: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]
) -> list[str]:
    """The names of a parameter's one or two tensors, checked."""
    factors = {
        f"{name}/rows": shape[:-1],
        f"{name}/columns": (*shape[:-2], *shape[-1:]),
    }
    factored = len(shape) > 1 and not factors.keys().isdisjoint(tensors)
    expected = factors if factored else {name: shape}
    for part, like in expected.items():
        if part not in tensors:
            other = "" if factored or len(shape) < 2 else ", nor its rows and columns"
            raise ValueError(
                f"{path}: no tensor {part} {list(like)}{other}; the model has that "
                "parameter"
            )
        _, found, dtype = tensors[part]
        if found != like:
            raise ValueError(
                f"{path}: tensor {part} has shape {list(found)}, expected "
                f"{list(like)} by the model"
            )
        if dtype != "F32":
            raise ValueError(f"{path}: tensor {part} has dtype {dtype}, expected F32")
    return list(expected)


def _check_values(what: str, values: np.ndarray) -> None:
    if not (np.isfinite(values).all() and (values >= 0).all()):
        odd = values[~(np.isfinite(values) & (values >= 0))].flat[0]
        raise ValueError(f"{what} must be finite and 0 or above, got {odd}")
