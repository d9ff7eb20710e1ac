"""Exact counts of array entries, of any size, and without temporaries of theirs.

JAX without x64 has no integers beyond 32 bits, and arrays of more entries exist.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mofo_jax._selection.options import options

# XLA on the CPU leaves a reduction over at most 32 entries whole.
_GROUP = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Integers:
    """Exact non-negative integers.

    Attributes:
      limbs: their digits, the most significant first, in arrays of one shape: uint32
        in base 2^32, or the digits of an index.
    """

    limbs: tuple[jax.Array, ...]

    @classmethod
    def of(cls, values: list[int], size: int) -> "Integers":
        """Integers ``[1, len(values)]`` of one limb or two."""
        parts = zip(
            *(divmod(value, 2**32)[2 - size :] for value in values), strict=True
        )
        return cls(tuple(jnp.asarray(np.array([part], np.uint32)) for part in parts))

    @staticmethod
    def where(condition: jax.Array, a: "Integers", b: "Integers") -> "Integers":
        pairs = zip(a.limbs, b.limbs, strict=True)
        return Integers(tuple(jnp.where(condition, x, y) for x, y in pairs))

    def __getitem__(self, index: slice) -> "Integers":
        return Integers(tuple(limb[index] for limb in self.limbs))

    def __lt__(self, other: "Integers") -> jax.Array:
        less = self.limbs[-1] < other.limbs[-1]
        for x, y in zip(self.limbs[-2::-1], other.limbs[-2::-1], strict=True):
            less = (x < y) | ((x == y) & less)
        return less

    def __ge__(self, other: "Integers") -> jax.Array:
        if len(self.limbs) == 1:
            return self.limbs[0] >= other.limbs[0]
        return ~(self < other)

    def equals(self, other: "Integers") -> jax.Array:
        equal = (x == y for x, y in zip(self.limbs, other.limbs, strict=True))
        return functools.reduce(jnp.logical_and, equal)

    def __sub__(self, other: "Integers") -> "Integers":
        if len(self.limbs) == 1:
            return Integers((self.limbs[0] - other.limbs[0],))
        (high, low), (other_high, other_low) = self.limbs, other.limbs
        borrow = (low < other_low).astype(jnp.uint32)
        return Integers((high - other_high - borrow, low - other_low))

    def to_float(self) -> jax.Array:
        """Nearest float32, for estimates."""
        value = self.limbs[-1].astype(jnp.float32)
        for limb in self.limbs[:-1]:
            value = value + limb.astype(jnp.float32) * np.float32(2.0**32)
        return value


def limbs_for(largest: int) -> int:
    """How many limbs a count has that may be as large."""
    return 1 if largest < options.value.integer_limit else 2


def count(marks: list[jax.Array], axes: tuple[int, ...]) -> Integers:
    """How many marks are true along the axes: ``[len(marks), other entries]``.

    The arrays are of one shape. What crosses devices is counts.
    """
    # On the CPU, XLA splits a long reduction into stages and writes out what the
    # first one reads, unless it is so short that it is a single stage.
    counts: list[Integers] = lax.platform_dependent(
        marks,
        cpu=lambda ms: [sum_exactly(_sum_groups(m, axes), axes, m.shape) for m in ms],
        default=lambda ms: [sum_exactly(m, axes, m.shape) for m in ms],
    )
    flat = [[_flat(limb) for limb in c.limbs] for c in counts]
    return Integers(tuple(jnp.stack(limbs) for limbs in zip(*flat, strict=True)))


def _sum_groups(marks: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Adds up to _GROUP marks that neighbour along one of the axes, as int8."""
    # Within a shard, however the axes are sharded: a group over two would be gathered.
    shards = [math.gcd(size, jax.device_count()) for size in marks.shape]
    group = {a: math.gcd(_GROUP, marks.shape[a] // shards[a]) for a in axes}
    # A longer group first; then an early axis, along which vector units need no
    # shuffles.
    axis = max(axes, key=lambda a: (group[a], -a))
    size = group[axis]
    shape = (*marks.shape[:axis], -1, size, *marks.shape[axis + 1 :])
    return jnp.sum(marks.reshape(shape), axis=axis + 1, dtype=jnp.int8)


def sum_exactly(
    counts: jax.Array, axes: tuple[int, ...], shape: tuple[int, ...]
) -> Integers:
    """Sum along the axes, of counts that stand for an array of a shape."""
    total = functools.partial(jnp.sum, dtype=jnp.uint32, keepdims=True)
    inner: list[int] = []
    for axis in sorted(axes, key=lambda a: shape[a], reverse=True):
        if limbs_for(math.prod(shape[a] for a in (*inner, axis))) > 1:
            break
        inner.append(axis)
    outer = tuple(a for a in axes if a not in inner)
    counts = total(counts, axis=tuple(inner))
    if not outer:
        return Integers((counts,))
    # Digits in base 256 can be summed over 2^24 counts without overflow; carries are
    # passed on afterwards.
    carry = jnp.zeros_like(total(counts, axis=outer))
    low = jnp.zeros_like(carry)
    for shift in (0, 8, 16, 24):
        carry = carry + total((counts >> shift) & 255, axis=outer)
        low = low | ((carry & 255) << shift)
        carry = carry >> 8
    return Integers((carry, low))


def _flat(x: jax.Array) -> jax.Array:
    """A vector of the entries, also where a mesh axis of Explicit type splits them."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.explicit_axes:
        x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))
    return x.reshape(-1)
