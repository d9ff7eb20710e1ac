"""A model's parameters by name: their shapes, and a model made of read ones."""

import types
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama

DTypeName = Literal["float32", "bfloat16", "float16"]
# Of a parameter's name and the part of it that is asked for.
Read = Callable[[str, tuple[slice, ...]], np.ndarray]
# Of a parameter's name and shape.
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def abstract_model(
    config: LlamaConfig, dtype: DTypeLike, param_dtype: DTypeLike
) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's graph and its parameters' shapes and dtypes, nothing allocated."""

    # nnx.Rngs counts the keys that it gave. Each count has JAX look through all of the
    # layers before, which takes seconds for 30 of them.
    rngs: Any = types.SimpleNamespace(params=lambda: jax.random.key(0))

    def create() -> Llama:
        return Llama(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    return nnx.split(nnx.eval_shape(create))


def parameter_name(path: tuple[jax.tree_util.DictKey, ...]) -> str:
    return ".".join(str(part.key) for part in path)


def named_parameters(model: Llama | nnx.State) -> dict[str, jax.Array]:
    """The parameters, or what stands for them, as {"norm.scale": ...}."""
    state = nnx.state(model, nnx.Param) if isinstance(model, Llama) else model
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(state))
    return {parameter_name(path): leaf for path, leaf in leaves}


def build(
    config: LlamaConfig,
    read: Read,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    sharding: Sharding | None = None,
) -> Llama:
    """A model whose parameters are read one by one, each device's part by itself.

    Args:
      config: The model's shape.
      read: Returns the part [index] of the parameter of that name, of any dtype.
      dtype: The model's compute dtype.
      param_dtype: The dtype that the parameters are cast to.
      sharding: Where each parameter goes; None is JAX's default device.
    """
    graph, state = abstract_model(config, dtype, param_dtype)
    leaves, tree = jax.tree.flatten_with_path(nnx.to_pure_dict(state))
    arrays: list[jax.Array | None] = [None] * len(leaves)
    # The largest first: its copies on the way find the memory still empty.
    for i in sorted(range(len(leaves)), key=lambda i: -leaves[i][1].size):
        name, like = parameter_name(leaves[i][0]), leaves[i][1]

        def part(
            index: tuple[slice, ...] | None, name: str = name, like: jax.Array = like
        ) -> np.ndarray:
            whole = (slice(None),) * like.ndim
            values = read(name, whole if index is None else index)
            return values.astype(like.dtype)  # a copy, no view of a file

        if sharding is None:
            array = jnp.array(part(None))
        else:
            place = sharding(name, like.shape)
            array = jax.make_array_from_callback(like.shape, place, part)
        # Else the host's copies pile up while they wait for a device.
        arrays[i] = array.block_until_ready()
    nnx.replace_by_pure_dict(state, jax.tree.unflatten(tree, arrays))
    return nnx.merge(graph, state)
