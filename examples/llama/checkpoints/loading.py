"""Load a model, whatever the format of its files. Nothing here unpickles."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.gguf_files import is_gguf
from examples.llama.checkpoints.adapter import load_adapter
from examples.llama.checkpoints.gguf_model import load_gguf
from examples.llama.checkpoints.huggingface import load_hugging_face
from examples.llama.checkpoints.llama2c import load_llama2c
from examples.llama.model.llama import Llama
from examples.llama.model.parameters import Sharding


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    sharding: Sharding | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Llama:
    """Loads the directory of a Hugging Face checkpoint, a GGUF or a llama2.c file.

    Args:
      path: The file or directory.
      dtype: The model's compute dtype.
      param_dtype: The dtype that the weights are cast to.
      sharding: A function of a parameter's name ("layers.0.mlp.up_proj.kernel") and
        shape that returns where it goes; None is JAX's default device. In several
        processes, each must be able to read `path`.
      adapter: The directory of a PEFT adapter, whose LoRA the model gets.

    Raises:
      FileNotFoundError: Nothing is at `path`.
      ValueError: It is none of these, or it is damaged; or the adapter is, or is not
        one for this model.
    """
    if Path(path).is_dir():
        load = load_hugging_face
    else:
        load = load_gguf if is_gguf(path) else load_llama2c
    model = load(path, dtype=dtype, param_dtype=param_dtype, sharding=sharding)
    if adapter is not None:
        load_adapter(model, adapter, sharding=sharding)
    return model


def check_finite(model: Llama, path: str | os.PathLike[str]) -> None:
    """Raises ValueError, which names the parameter, where a weight is not finite.

    Such a model answers with nothing, or with anything. `path` is what it came from.
    """
    params = nnx.state(model, (nnx.Param, nnx.LoRAParam))
    counts = {
        "/".join(map(str, name)): (_count_odd(leaf[...]), str(leaf.dtype))
        for name, leaf in nnx.to_flat_state(params)
    }
    for name, (count, dtype) in counts.items():
        if count:
            raise ValueError(
                f"{path}: {count} entries of {name} are not finite in {dtype}: the "
                "file is damaged, or it is of a run that diverged"
            )


@jax.jit
def _count_odd(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)
