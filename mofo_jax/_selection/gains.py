"""Predicted gains, which the search reads without an array of them being stored."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mofo_jax._checks import at_least_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Gain:
    """An array of max(0, sign * gradient * step), computed wherever it is read.

    Stored, the gains of a tree would take as much memory as its gradients. The product
    is at least of float32. Products below its smallest normal number count as 0, so
    that the gain is the same whether a device flushes them or not. NaN stays NaN.

    Attributes:
      gradient: real, of any shape.
      step: real, of the same shape.
      sign: 1 if the step is subtracted from the parameters, -1 if it is added.
    """

    gradient: jax.Array
    step: jax.Array
    sign: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.gradient.shape

    @property
    def ndim(self) -> int:
        return self.gradient.ndim

    @property
    def size(self) -> int:
        return self.gradient.size

    @property
    def dtype(self) -> np.dtype[Any]:
        widest = max(self.gradient.dtype.itemsize, self.step.dtype.itemsize)
        return np.dtype(np.float64 if widest > 4 else np.float32)

    def values(self) -> jax.Array:
        """The array itself."""
        kind = self.dtype
        gradient, step = (x.astype(kind) for x in (self.gradient, self.step))
        product = self.sign * gradient * step
        tiny = np.array(jnp.finfo(kind).tiny, kind)
        return jnp.where(product < tiny, np.zeros((), kind), product)


# What the search can rank.
Rankable = jax.Array | Gain


def gain_of(gradient: jax.Array, step: jax.Array, sign: int) -> Rankable:
    """The gain of a step, to first order; of complex numbers, Re(conj(g) step)."""
    if not jnp.iscomplexobj(step):
        return Gain(gradient, step, sign)
    parts = [
        at_least_float32(jnp.real(gradient)) * jnp.real(step),
        at_least_float32(jnp.imag(gradient)) * jnp.imag(step),
    ]
    # Stored: a sum of products made twice may be rounded in two ways.
    gain = sign * (parts[0] + parts[1])
    return Gain(gain, jnp.ones_like(gain), 1)
