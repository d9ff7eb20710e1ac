"""Low-rank adaptation, LoRA (arXiv 2106.09685), of a Llama's seven projections."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.llama.model.llama import Llama
from examples.llama.model.parameters import Sharding
from examples.llama.model.products import float32_einsum

PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


class LoRALinear(nnx.Module):
    """A linear map, frozen, plus a trained product of two narrow ones.

    ``y = x W + (alpha / rank) (x A) B`` with A [in, rank] and B [rank, out]; A starts
    as uniform noise, as in the authors' code, and B as zeros, so that y starts as x W.
    """

    def __init__(
        self, base: nnx.Linear, rank: int, alpha: float, *, rngs: nnx.Rngs
    ) -> None:
        inputs, outputs = base.in_features, base.out_features
        dtype = base.param_dtype
        # nn.Linear's own start in PyTorch, which the authors' code has for A.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.kernel = base.kernel
        noise = init(rngs.params(), (inputs, rank), jnp.float32)
        self.lora_a = nnx.LoRAParam(noise.astype(dtype))
        self.lora_b = nnx.LoRAParam(jnp.zeros((rank, outputs), dtype))
        self.scale, self.dtype = alpha / rank, base.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, a, b = (
            p[...].astype(self.dtype) for p in (self.kernel, self.lora_a, self.lora_b)
        )
        x = x.astype(self.dtype)
        return x @ kernel + (x @ a) @ b * jnp.asarray(self.scale, self.dtype)


def add_lora(
    model: Llama,
    rank: int,
    alpha: float,
    *,
    rngs: nnx.Rngs,
    sharding: Sharding | None = None,
) -> None:
    """Puts a `LoRALinear` of `rank` around each projection of `model`, in place.

    Args:
      model: A model without LoRA.
      rank: Width of the products, r in the paper.
      alpha: The product is multiplied by alpha / rank.
      rngs: Of A's noise, the same whatever the sharding.
      sharding: A function of a parameter's name and shape that returns where it goes;
        None is JAX's default device.

    Raises:
      ValueError: `rank` is not 1 to the narrowest width of a projection, or `alpha`
        is not above 0.
    """
    config = model.config
    narrowest = min(
        config.hidden_size,
        config.intermediate_size,
        config.num_key_value_heads * config.head_size,
    )
    if not 1 <= rank <= narrowest:
        raise ValueError(f"lora_rank must be 1 to {narrowest}, got {rank}")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"lora_alpha must be above 0, got {alpha}")
    for i, layer in enumerate(model.layers):
        for block, names in PROJECTIONS.items():
            module = getattr(layer, block)
            for name in names:
                new = LoRALinear(getattr(module, name), rank, alpha, rngs=rngs)
                setattr(module, name, new)
                if sharding is None:
                    continue
                for part in ("lora_a", "lora_b"):
                    variable = getattr(new, part)
                    to = sharding(f"layers.{i}.{block}.{name}.{part}", variable.shape)
                    # From the host, because several processes have no device in common.
                    variable[...] = jax.device_put(np.asarray(variable[...]), to)


def merge_lora(params: dict[str, Any], scale: float) -> dict[str, Any]:
    """A parameter tree in which each kernel has its low-rank product added.

    Args:
      params: Nested dictionaries, as of `nnx.to_pure_dict`, of a model with or without
        LoRA. The sums are formed in float32 and have the kernels' dtypes.
      scale: alpha / rank.

    Returns:
      The tree of the model without LoRA.
    """
    if "lora_a" in params:
        kernel, a, b = params["kernel"], params["lora_a"], params["lora_b"]
        product = float32_einsum("ir,ro->io", a, b)
        merged = kernel.astype(jnp.float32) + scale * product
        return {"kernel": merged.astype(kernel.dtype)}
    return {
        key: merge_lora(value, scale) if isinstance(value, dict) else value
        for key, value in params.items()
    }
