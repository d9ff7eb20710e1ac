"""How many entries of a block are selected: k = min(n, max(1, floor(alpha n)))."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from mofo_jax._checks import at_least_float32
from mofo_jax._selection.counting import Integers, limbs_for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Fraction:
    """alpha: a number, known while a program is traced, or an array."""

    number: float | None = dataclasses.field(metadata={"static": True})
    array: jax.Array | None

    @classmethod
    def of(cls, alpha: jax.typing.ArrayLike) -> "Fraction":
        if isinstance(alpha, numbers.Real):
            return cls(float(alpha), None)
        return cls(None, at_least_float32(jnp.asarray(alpha)))

    def known_k(self, n: int) -> int | None:
        """k for a block of n entries, None if it is known only as the program runs."""
        if self.number is None:
            return None
        return min(n, max(1, math.floor(self.number * n)))

    def k(self, n: list[int]) -> Integers:
        """k for blocks of n entries: ``[1, len(n)]``."""
        size = limbs_for(max(n))
        known = [self.known_k(entries) for entries in n]
        if self.array is None:
            return Integers.of([k for k in known if k is not None], size)
        everything = Integers.of(n, size)
        product = jnp.floor(self.array * np.array([n], self.array.dtype))
        product = jnp.where(product >= 1, product, 1)  # NaN, too, becomes 1
        parts = (jnp.floor(product / 2.0**32), product % 2.0**32)[2 - size :]
        some = Integers(tuple(part.astype(jnp.uint32) for part in parts))
        # n may not be representable in alpha's dtype, so alpha = 1 is a case of its
        # own.
        all_of_them = (self.array >= 1) | (some >= everything)
        return Integers.where(all_of_them, everything, some)
