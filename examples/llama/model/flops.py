"""Model FLOPs utilization: how much of the device's speed training uses (MFU).

As in the appendix of PaLM (arXiv 2204.02311): the operations that the model needs,
whatever is computed again to save memory, over those that the device could do.
"""

import functools
import time

import jax
import jax.numpy as jnp

from examples.llama.model.architectures import LlamaConfig

# Dense bfloat16 operations per second, from the makers' data sheets.
_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "T4": 65e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def training_flops(config: LlamaConfig, length: int, *, lora: bool = False) -> float:
    """Floating-point operations that training needs for each token.

    Two per weight that a token is multiplied with, in the forward pass and twice in
    the backward pass (once with LoRA, where the weights have no gradient), and the
    attention over `length` positions, of which half are masked.
    """
    heads = config.num_attention_heads + config.num_key_value_heads
    layer = 2 * config.hidden_size * heads * config.head_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.hidden_size * config.vocab_size
    weights = config.num_hidden_layers * layer + head
    attention = config.num_attention_heads * config.head_size * length
    passes = 2 if lora else 3
    return 2.0 * passes * weights + 3 * 2 * config.num_hidden_layers * attention


@functools.cache
def peak_flops(device: jax.Device, dtype: str) -> tuple[float, str]:
    """Operations per second that `device` can do, and where that number is from.

    Of known kinds it is the data sheet's, for bfloat16 whatever `dtype` is; of others,
    CPUs among them, what the product of two matrices of `dtype` reaches here.
    """
    for kind, peak in _PEAKS.items():
        if kind.lower() in device.device_kind.lower():
            return peak, f"data sheet of {kind}, bfloat16"
    size = 2048
    with jax.default_device(device):
        x = jnp.ones((size, size), dtype)
        product = jax.jit(jnp.matmul)
        product(x, x).block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times), f"measured, product of {size} x {size} {dtype}"
