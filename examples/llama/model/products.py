"""Products of low-precision arrays with float32 results."""

import jax
import jax.numpy as jnp

from examples.llama.model.platforms import platform


def float32_einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, summed and returned in float32."""
    if platform() == "cpu":
        # XLA's CPU backend lacks a kernel for some fusions of bfloat16 products (jax
        # 0.10.2: "BF16 x BF16 = F32"), and computes the others in float32.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
