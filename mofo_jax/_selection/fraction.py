"""How many entries of a block are selected: k = min(n, max(1, floor(alpha n)))."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mofo_jax._checks import at_least_float32
from mofo_jax._selection import counting


def static(alpha: jax.typing.ArrayLike) -> float | None:
    """alpha if it is a number, None if it is an array."""
    return float(alpha) if isinstance(alpha, numbers.Real) else None


def static_k(alpha: float, n: int) -> int:
    return min(n, max(1, math.floor(alpha * n)))


def k_limbs(static_alpha: float | None, alpha: Any, n: list[int]) -> counting.Limbs:
    """k for blocks of n entries, with as many limbs as a count of the largest has."""
    count = 1 if max(n) < counting.LIMB_SIZE else 2
    if static_alpha is not None:
        return counting.limbs([static_k(static_alpha, size) for size in n], count)
    everything = counting.limbs(n, count)
    alpha = at_least_float32(jnp.asarray(alpha))
    product = jnp.floor(alpha * np.array([n], alpha.dtype))
    product = jnp.where(product >= 1, product, 1)  # NaN, too, becomes 1
    parts = (jnp.floor(product / 2.0**32), product % 2.0**32)[2 - count :]
    some = tuple(part.astype(jnp.uint32) for part in parts)
    # n may not be representable in alpha's dtype, so alpha = 1 is a case of its own.
    return counting.where(
        (alpha >= 1) | ~counting.less(some, everything), everything, some
    )
