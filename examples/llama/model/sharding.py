"""Where parameters, optimizer states and batches lie on a mesh of devices.

Each dimension of an array has a logical name, and one table, `RULES`, says over which
axes of the mesh dimensions of that name are split. An axis that does not divide a
dimension leaves it whole.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# data: copies of the model. fsdp: its parameters in parts, gathered layer by layer.
# tensor: its products in parts. The first two split the batch.
MESH_AXES = ("data", "fsdp", "tensor")
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "rank": (),  # of LoRA
    "norm": (),
    None: (),
}
_IN_OUT = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    "lm_head": ("embed", "vocab"),
}


def logical_axes(name: str) -> tuple[str, ...]:
    """The logical axes of the parameter at "layers.0.mlp.up_proj.kernel", say."""
    *_, module, last = name.split(".")
    if last == "embedding":
        return ("vocab", "embed")
    if last == "scale":
        return ("norm",)
    inputs, outputs = _IN_OUT[module]
    return {
        "kernel": (inputs, outputs),
        "lora_a": (inputs, "rank"),
        "lora_b": ("rank", outputs),
    }[last]


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that "fsdp=4,tensor=2" describes, over the first eight devices.

    Args:
      text: Sizes of the axes "data", "fsdp" and "tensor", those left out being 1. One
        of them may be -1: as many as the devices allow.
      devices: By default all of them, of all processes.

    Raises:
      ValueError: An axis is unknown or repeated, a size is no such number, or the
        devices are too few, or, in several processes, are not all in use.
    """
    devices = jax.devices() if devices is None else devices
    allowed = 'mesh must look like "fsdp=4,tensor=2", of the axes ' + ", ".join(
        MESH_AXES
    )
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (x.strip() for x in part.partition("="))
        if axis not in MESH_AXES or axis in sizes:
            raise ValueError(f"{allowed}, each once; got {text!r}")
        if not (size == "-1" or (size.isdecimal() and int(size) > 0)):
            raise ValueError(f"{allowed} and of sizes above 0, or -1; got {text!r}")
        sizes[axis] = int(size)
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) > 1:
        raise ValueError(f"{allowed}, at most one of them -1; got {text!r}")
    if -1 in shape:
        shape[shape.index(-1)] = len(devices) // -math.prod(shape) or 1
    needed = math.prod(shape)
    if needed > len(devices) or (jax.process_count() > 1 and needed < len(devices)):
        raise ValueError(f"mesh {text!r} has {needed} devices, found {len(devices)}")
    return jax.make_mesh(
        tuple(shape),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[:needed],
    )


def partition(mesh: Any, axes: Sequence[str | None], shape: Sequence[int]) -> Any:
    """The PartitionSpec of an array with these logical axes and this shape."""
    parts = []
    for axis, size in zip(axes, shape, strict=True):
        over = tuple(name for name in RULES[axis] if mesh.shape[name] > 1)
        divides = size % math.prod(mesh.shape[name] for name in over) == 0
        parts.append(over if over and divides else None)
    return PartitionSpec(*parts)


def parameter_sharding(
    mesh: Mesh,
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """A function of a parameter's name and shape, as `convert.load_model` takes it."""

    def sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, partition(mesh, logical_axes(name), shape))

    return sharding


def fisher_sharding(
    mesh: Mesh,
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """As `parameter_sharding`, for Fisher information.

    The factors of a parameter, NAME/rows and NAME/columns, are small, so every device
    has them whole.
    """
    dense = parameter_sharding(mesh)
    return lambda name, shape: replicated(mesh) if "/" in name else dense(name, shape)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Has x split by its logical axes, where `jax.set_mesh` has set a mesh of ours."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_names != MESH_AXES:
        return x
    return jax.lax.with_sharding_constraint(x, partition(mesh, axes, x.shape))


def shardings_of(params: Any) -> Any:
    """Each leaf's sharding, in the tree of `params`."""
    return jax.tree.map(lambda x: x.sharding, params)


def state_shardings(
    optimizer: optax.GradientTransformation, params: nnx.State, mesh: Mesh
) -> Any:
    """Shardings of the optimizer's state: moments like parameters, the rest whole."""

    def masked(x: Any) -> bool:  # a masked moment, in HFT
        return isinstance(x, optax.MaskedNode)

    return optax.tree.map_params(
        optimizer,
        lambda x, sharding: x if masked(x) else sharding,
        jax.eval_shape(optimizer.init, params),
        shardings_of(params),
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=masked,
    )


def batch_rows(mesh: Mesh) -> int:
    """Among how many parts a batch's rows are divided."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def check_rows(rows: int, mesh: Mesh, text: str) -> None:
    """Raises ValueError unless the mesh, made of that text, divides a batch's rows."""
    if rows % (among := batch_rows(mesh)):
        raise ValueError(
            f"batch_size / accumulate must be a multiple of {among}, over which the "
            f"mesh {text} divides it, got {rows}"
        )


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, parts: int | None = None
) -> dict[str, jax.Array]:
    """The global batch. Every process brings its share of the rows.

    Args:
      batch: This process's rows.
      mesh: Over which they go.
      parts: Cut the batch into so many, along a new first axis.
    """
    lead = () if parts is None else (parts,)

    def put(x: np.ndarray) -> jax.Array:
        x = x.reshape(*lead, -1, *x.shape[1:]) if lead else x
        rows = x.shape[len(lead)] * jax.process_count()
        shape = (*lead, rows, *x.shape[len(lead) + 1 :])
        axes = (None,) * len(lead) + ("batch",) + (None,) * (x.ndim - len(lead) - 1)
        sharding = NamedSharding(mesh, partition(mesh, axes, shape))
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return {name: put(x) for name, x in batch.items()}
