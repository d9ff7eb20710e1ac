"""Low-rank adaptation, LoRA (arXiv 2106.09685), of a Llama's seven projections."""

import functools
from collections.abc import Collection, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from examples.llama.model.llama import Llama
from examples.llama.model.parameters import Sharding
from examples.llama.model.products import float32_einsum

_BLOCKS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
PROJECTIONS = tuple(name for names in _BLOCKS.values() for name in names)


class LoRALinear(nnx.Module):
    """A linear map, frozen, plus a trained product of two narrow ones.

    ``y = x W + (alpha / rank) dropout(x) A B`` with A [in, rank] and B [rank, out]. The
    dropout is off until `start_dropout`. A and B are stored in float32, whatever the
    dtype of W.

    Args:
      base: The linear map, without a bias.
      a: [in, rank].
      b: [rank, out].
      alpha: The product is multiplied by alpha / rank.
      dropout: The share of x's entries that are dropped in training.
    """

    def __init__(
        self,
        base: nnx.Linear,
        a: ArrayLike,
        b: ArrayLike,
        alpha: float,
        dropout: float = 0.0,
    ) -> None:
        self.kernel = base.kernel
        self.lora_a = nnx.LoRAParam(jnp.asarray(a, jnp.float32))
        self.lora_b = nnx.LoRAParam(jnp.asarray(b, jnp.float32))
        self.dropout = nnx.Dropout(dropout, deterministic=True)
        self.alpha, self.dtype = alpha, base.dtype

    @property
    def rank(self) -> int:
        return self.lora_a.shape[1]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        a, b = (p[...].astype(self.dtype) for p in (self.lora_a, self.lora_b))
        scale = jnp.asarray(self.alpha / self.rank, self.dtype)
        product = (self.dropout(x) @ a) @ b
        return _frozen_product(x, self.kernel[...]) + product * scale

    def merged(self, dtype: DTypeLike | None = None) -> nnx.Linear:
        """One linear map that does the same; see `merge_lora`."""
        kernel = _sum(
            *(p[...] for p in (self.kernel, self.lora_a, self.lora_b)),
            scale=self.alpha / self.rank,
            dtype=self.kernel.dtype if dtype is None else jnp.dtype(dtype),
        )
        linear = nnx.eval_shape(  # which draws no kernel
            lambda: nnx.Linear(
                *kernel.shape,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=kernel.dtype,
                rngs=nnx.Rngs(0),
            )
        )
        linear.kernel = nnx.Param(kernel)
        return linear


# The backward pass converts the kernel again. Else it would keep what the forward pass
# converted: a copy of the whole model in a wider dtype.
@jax.checkpoint
def _frozen_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel.astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def _sum(
    kernel: jax.Array, a: jax.Array, b: jax.Array, *, scale: float, dtype: np.dtype
) -> jax.Array:
    product = float32_einsum("ir,ro->io", a, b)
    return (kernel.astype(jnp.float32) + scale * product).astype(dtype)


def projections(model: Llama) -> Iterator[tuple[str, nnx.Module, str]]:
    """Each projection's path, "layers.0.mlp.up_proj", its module and its name there."""
    for i, layer in enumerate(model.layers):
        for block, names in _BLOCKS.items():
            for name in names:
                yield f"layers.{i}.{block}.{name}", getattr(layer, block), name


def lora_layers(model: Llama) -> dict[str, LoRALinear]:
    """What of a model has LoRA, by its path."""
    found = {path: getattr(block, name) for path, block, name in projections(model)}
    return {path: x for path, x in found.items() if isinstance(x, LoRALinear)}


def add_lora(
    model: Llama,
    rank: int,
    alpha: float,
    *,
    rngs: nnx.Rngs,
    targets: Collection[str] = PROJECTIONS,
    dropout: float = 0.0,
    sharding: Sharding | None = None,
) -> None:
    """Puts a `LoRALinear` around projections of `model`, in place.

    A starts as uniform noise, as in the authors' code, and B as zeros, so that the
    model computes what it did before.

    Args:
      model: A model without LoRA.
      rank: Width of the products, r in the paper.
      alpha: The product is multiplied by alpha / rank.
      rngs: Source of A's noise, the same for any sharding.
      targets: Which projections of each layer.
      dropout: The share of their inputs' entries that the products do not see in
        training; see `start_dropout`.
      sharding: A function of a parameter's name and shape that returns where it goes;
        None is JAX's default device.

    Raises:
      ValueError: `rank` is not 1 to the narrowest width of these projections, or
        `alpha` is not above 0.
    """
    chosen = [x for x in projections(model) if x[2] in targets]
    kernels = [getattr(block, name).kernel for _, block, name in chosen]
    narrowest = min(min(kernel.shape) for kernel in kernels)
    if not 1 <= rank <= narrowest:
        raise ValueError(f"lora_rank must be 1 to {narrowest}, got {rank}")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"lora_alpha must be above 0, got {alpha}")
    # nn.Linear's own start in PyTorch, which the authors' code has for A.
    init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    for (path, block, name), kernel in zip(chosen, kernels, strict=True):
        inputs, outputs = kernel.shape
        a = init(rngs.params(), (inputs, rank), jnp.float32)
        b = jnp.zeros((rank, outputs), jnp.float32)
        new = LoRALinear(getattr(block, name), a, b, alpha, dropout)
        setattr(block, name, new)
        if sharding is not None:
            place(path, new, sharding)


def place(path: str, linear: LoRALinear, sharding: Sharding) -> None:
    """Moves A and B to where `sharding` has parameters of their names."""
    for part in ("lora_a", "lora_b"):
        variable = getattr(linear, part)
        to = sharding(f"{path}.{part}", variable.shape)
        # From the host, because several processes have no device in common.
        variable[...] = jax.device_put(np.asarray(variable[...]), to)


def start_dropout(model: Llama, key: jax.Array) -> None:
    """Has a model's LoRA drop entries of its inputs from now on, in place.

    Args:
      model: A model with LoRA.
      key: What is dropped depends on it, and on the path of the projection.
    """
    for i, linear in enumerate(lora_layers(model).values()):
        rngs = nnx.Rngs(jax.random.fold_in(key, i))
        linear.dropout = nnx.Dropout(linear.dropout.rate, rngs=rngs)


def merge_lora(model: Llama, dtype: DTypeLike | None = None) -> None:
    """Adds each low-rank product to its kernel, in place: LoRA is gone then.

    Args:
      model: A model with or without LoRA.
      dtype: Of the sums, which are formed in float32; None is the kernel's own.
    """
    for _, block, name in projections(model):
        if isinstance(linear := getattr(block, name), LoRALinear):
            setattr(block, name, linear.merged(dtype))
