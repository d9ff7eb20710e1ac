"""What a program that is traced now will run on.

The devices of the mesh that is set decide (:func:`jax.set_mesh`), so that programs can
be compiled ahead of time for other hardware. Without one, JAX's default devices do.
"""

import jax


def platform() -> str:
    """``"cpu"``, ``"tpu"`` or ``"gpu"``."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind: str = device.device_kind
    return kind if kind == "cpu" else "tpu" if kind.startswith("TPU") else "gpu"


def on_one_device() -> bool:
    """Whether no array can lie on several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return (jax.device_count() if mesh.empty else mesh.size) == 1
