"""What a program that is traced now will run on."""

import jax


def platform() -> str:
    """The name of the platform: "cpu", "gpu" or "tpu".

    The devices of the mesh that is set decide (`jax.set_mesh`), so that programs can be
    compiled ahead of time for other hardware. Without one, it is JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
