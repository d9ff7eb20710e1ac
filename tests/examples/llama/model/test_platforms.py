"""Programs are traced for the devices that they will run on."""

import jax
import jax.numpy as jnp

from examples.llama.model.attention import attend
from examples.llama.model.platforms import platform


def mesh_of(kind, name):
    device = jax.sharding.AbstractDevice(kind, 1, name)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_platform():
    assert platform() == "cpu"
    with jax.set_mesh(jax.make_mesh((2,), ("x",))):
        assert jax.jit(lambda x: x + len(platform()))(1) == 4
    with mesh_of("TPU v5", "tpu"):
        assert platform() == "tpu"
    with mesh_of("NVIDIA H100", "gpu"):
        assert platform() == "gpu"


def test_attention():
    x = jnp.ones((1, 16, 2, 8), jnp.bfloat16)

    def program():
        return str(jax.make_jaxpr(lambda x: attend(x, x, x, None))(x))

    here = program()
    with mesh_of("TPU v5", "tpu"):
        assert program() != here
    with mesh_of("cpu", "cpu"):
        assert program() == here
