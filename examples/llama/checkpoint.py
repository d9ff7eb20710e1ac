"""Save a model, and load what was saved or converted."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike

from examples.llama.convert import abstract_model, load_llama2c, parameter_name
from examples.llama.model import Llama, LlamaConfig


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> Llama:
    """Loads a model from a llama2.c file or from a directory of `save_model`.

    Saved parameters come back bit for bit where `param_dtype` is the dtype they were
    saved in, and are cast otherwise.

    Args:
      path: The file or directory.
      dtype: The model's compute dtype.
      param_dtype: The dtype of the parameters.

    Raises:
      FileNotFoundError: Nothing is at `path`.
      ValueError: What is there is something else, or is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        return load_llama2c(path, dtype=dtype, param_dtype=param_dtype)
    for name in ("config.json", "params"):
        if not (path / name).exists():
            raise ValueError(f"{path}: not a model of save_model, it has no {name}")
    try:
        config = LlamaConfig.from_dict(json.loads((path / "config.json").read_text()))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    graph, state = abstract_model(config, dtype, param_dtype)
    # Named, because the devices that it was saved from need not exist here.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        nnx.to_pure_dict(state),
    )
    params = path.absolute() / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(params).item_metadata
        if stored is None:
            raise ValueError(f"{params}: damaged, or not a checkpoint of Orbax")
        found = {leaf.name: leaf.shape for leaf in jax.tree.leaves(stored.tree)}
        expected = {
            parameter_name(at): x.shape for at, x in jax.tree.leaves_with_path(target)
        }
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"{params}: shape of {name} is {found.get(name)}, expected "
                    f"{expected.get(name)} by config.json"
                )
        try:
            weights = checkpointer.restore(params, target)
        except Exception as error:  # of no closer type, and thousands of characters
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{params}: cannot be read: {reason} ...") from error
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)


def save_model(model: Llama, directory: str | os.PathLike[str]) -> None:
    """Writes config.json and the parameters for `load_model`, from one process.

    All of it is written beside `directory` and renamed at the end. A process killed on
    the way leaves the model that was there before, or, if it dies between the two
    renames, has it under the name ``.{directory}.previous``.

    Raises:
      ValueError: `directory` holds something other than a model saved here.
    """
    directory = Path(directory).resolve()
    staging = directory.with_name(f".{directory.name}.saving")
    previous = directory.with_name(f".{directory.name}.previous")
    if directory.exists():
        found = {p.name for p in directory.iterdir()} if directory.is_dir() else None
        if found not in (set(), {"config.json", "params"}):
            raise ValueError(
                f"{directory}: not overwritten, it is neither an empty directory nor "
                "one with config.json and params alone"
            )
    shutil.rmtree(staging, ignore_errors=True)  # of a process killed on the way
    staging.mkdir(parents=True)
    config = json.dumps(dataclasses.asdict(model.config), indent=2)
    (staging / "config.json").write_text(config + "\n")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(staging / "params", params)
    if directory.exists():
        shutil.rmtree(previous, ignore_errors=True)
        directory.rename(previous)
    staging.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)
