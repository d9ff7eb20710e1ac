"""Arrays of one kind, looked at together."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mofo_jax import counting
from mofo_jax.candidates import Gathered, gather
from mofo_jax.ranking import block_count, reaches
from mofo_jax.search import COUNT


class Unit(NamedTuple):
    """Arrays of one kind, and where their blocks are in a vector of all.

    XLA compiles a kernel for each slice at another offset, and for all that it fuses
    with it. In two steps, into units first, few are different.
    """

    start: int
    stop: int
    members: list[int]


# How many arrays of one kind make a unit.
_UNIT = 8


def make_units(kinds: list[tuple[tuple[int, ...], Any, tuple[int, ...]]]) -> list[Unit]:
    units: list[Unit] = []
    last, stop = None, 0
    for i, kind in enumerate(kinds):
        if kind != last or len(units[-1].members) == _UNIT:
            units.append(Unit(stop, stop, []))
        last, stop = kind, stop + block_count(kind[0], kind[2])
        units[-1] = units[-1]._replace(stop=stop, members=[*units[-1].members, i])
    return units


def each(part: jax.Array, members: int) -> list[jax.Array]:
    """The columns of each array of a unit."""
    size = part.shape[1] // members
    return [part[:, i * size : (i + 1) * size] for i in range(members)]


@jax.jit
def materialized(slices: list[jax.Array]) -> list[jax.Array]:
    """The same, which XLA does not fuse with what reads them, see :class:`Unit`."""
    never = slices[0].reshape(-1)[0] < 0
    zeros = lambda slices: jax.tree.map(jnp.zeros_like, slices)
    same: list[jax.Array] = lax.cond(never, zeros, lambda slices: slices, slices)
    return same


# Traced once for each kind of unit.
@functools.partial(
    jax.jit, static_argnames=("axes", "digits", "limbs", "choose", "gathers")
)
def look_at(
    xs: list[jax.Array],
    part: jax.Array,
    axes: tuple[int, ...],
    digits: int,
    limbs: int,
    choose: bool,
    gathers: bool,
) -> tuple[counting.Limbs, Gathered | None]:
    """What a unit's part of a request asks, ``[probes, blocks]``.

    Unless it may ``choose``, it counts always, and for nothing where a block is done.
    """
    nothing = (part[0, :1] * 0).astype(jnp.uint32)
    no_magnitudes = Gathered(*(part[0, :1] * 0,) * 2, *(nothing,) * 3)

    def counted(xs: list[jax.Array], part: jax.Array) -> Any:
        zero = (part[0, 0, 0] < 0).astype(jnp.int32)
        probes = range(part.shape[1])
        marks = []
        for probe in probes:
            thresholds = each(part[: 1 + digits, probe], len(xs))
            marks += [
                reaches(x, t, axes, zero) for x, t in zip(xs, thresholds, strict=True)
            ]
        counts = []
        for found in counting.count(marks, axes, zero):
            padding = (jnp.zeros_like(found[0]),) * (limbs - len(found))
            counts.append([_flat(limb) for limb in (*padding, *found)])
        stack = lambda *c: jnp.concatenate(c).reshape(part.shape[1:])
        return tuple(stack(*c) for c in zip(*counts, strict=True)), no_magnitudes

    def gathered(xs: list[jax.Array], part: jax.Array) -> Any:
        low, high, *numbers = part[2 + digits :, 0]
        found = gather(xs, low, high, *(n.astype(jnp.uint32) for n in numbers))
        found = Gathered(*(number[None] for number in found))
        return (nothing,) * limbs, found

    def skipped(xs: list[jax.Array], part: jax.Array) -> Any:
        return (nothing,) * limbs, no_magnitudes

    if not choose:
        return counted(xs, part)[0], None
    modes = part[1 + digits, 0]
    mode = jnp.where(jnp.any(modes == COUNT), COUNT, jnp.max(modes).astype(jnp.int32))
    branches = [skipped, counted, gathered if gathers else skipped]
    answer: tuple[counting.Limbs, Gathered] = lax.switch(mode, branches, xs, part)
    return answer


def _flat(x: jax.Array) -> jax.Array:
    """A vector of the entries, also where a mesh axis of Explicit type splits them."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.explicit_axes:
        x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))
    return x.reshape(-1)
