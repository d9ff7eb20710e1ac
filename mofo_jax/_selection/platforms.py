"""What a program that is traced now will run on."""

import jax


def on_cpus() -> bool:
    """Whether these are CPUs.

    The devices of the mesh that is set decide (:func:`jax.set_mesh`), so that programs
    can be compiled ahead of time for other hardware. Without one, it is JAX's default
    backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend() == "cpu"
    kind: str = device.device_kind
    return kind == "cpu"
