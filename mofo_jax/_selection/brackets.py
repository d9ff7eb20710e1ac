"""Brackets of thresholds, and how counts narrow them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mofo_jax._selection.counting import Integers
from mofo_jax._selection.ranking import Blocks


class Brackets(NamedTuple):
    """Brackets, on the digit of the threshold that is being searched for.

    Positions count upwards as ranks do: magnitudes, then indices from the last down.
    At least k entries reach low, and fewer than k exceed high.
    """

    low: jax.Array
    high: jax.Array
    reached: Integers  # number of entries that reach low
    exceeded: Integers  # number of entries that exceed high
    level: jax.Array  # 0 while the magnitude is searched, then 1 + the index's digit
    found: tuple[jax.Array, ...]  # positions of the digits already found
    slow_passes: jax.Array  # passes in sequence that brought no count much nearer to k
    stuck: jax.Array  # whether the last pass told no candidates apart
    leap: jax.Array  # grows while one end of the bracket is unknown


def start(blocks: Blocks, guess: jax.Array) -> Brackets:
    kind, shape = guess.dtype, guess.shape
    zero = jnp.zeros(shape, kind)
    return Brackets(
        low=zero,
        high=jnp.asarray(blocks.top, kind),
        reached=blocks.n,
        exceeded=Integers(tuple(jnp.zeros(shape, jnp.uint32) for _ in blocks.k.limbs)),
        level=jnp.zeros(shape, jnp.int32),
        found=(zero,) * len(blocks.sizes),
        slow_passes=jnp.zeros(shape, jnp.int32),
        stuck=jnp.zeros(shape, bool),
        leap=jnp.ones(shape, jnp.float32),
    )


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """Manual mesh axes of shard_map along which x varies."""
    return tuple(sorted(jax.typeof(x).manual_axis_type.varying))


def vary(tree: Any, axes: tuple[str, ...]) -> Any:
    """The arrays, marked as varying along the axes, which a loop's carry must be."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in axes if a not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def unfinished(brackets: Brackets, blocks: Blocks) -> jax.Array:
    """Whether no count of a block is k yet."""
    return ~brackets.reached.equals(blocks.k)


def narrow(
    brackets: Brackets, positions: jax.Array, counts: Integers, blocks: Blocks
) -> Brackets:
    """Brackets after the counts at some positions."""
    k, live = blocks.k, unfinished(brackets, blocks)
    low, high, reached, exceeded = brackets[:4]
    for probe in range(positions.shape[0]):
        position = positions[probe : probe + 1]
        count = counts[probe : probe + 1]
        enough = count >= k
        up = live & enough & (position > low)
        down = live & ~enough & (position <= high)
        low, reached = jnp.where(up, position, low), Integers.where(up, count, reached)
        high = jnp.where(down, position - 1, high)
        exceeded = Integers.where(down, count, exceeded)
    before = jnp.minimum(*distances(brackets.reached, brackets.exceeded, blocks))
    slow = jnp.minimum(*distances(reached, exceeded, blocks)) > before / 4
    same = reached.equals(brackets.reached)
    return brackets._replace(
        low=low,
        high=high,
        reached=reached,
        exceeded=exceeded,
        slow_passes=jnp.where(slow, brackets.slow_passes + 1, 0),
        stuck=live & same & exceeded.equals(brackets.exceeded),
    )


def next_digit(brackets: Brackets, blocks: Blocks) -> Brackets:
    """Turns to the index where a bracket of one magnitude holds more than k."""
    low, high = brackets.low, brackets.high
    level, found = brackets.level, brackets.found
    tied = jnp.zeros_like(brackets.stuck)
    for _ in blocks.sizes:
        tie = (low == high) & unfinished(brackets, blocks)
        found = tuple(
            jnp.where(tie & (level == digit), low, position)
            for digit, position in enumerate(found)
        )
        size = functools.reduce(
            lambda size, digit: jnp.where(level == digit, blocks.sizes[digit], size),
            range(1, len(blocks.sizes)),
            jnp.asarray(blocks.sizes[0], low.dtype),
        )
        low = jnp.where(tie, 0, low)
        high = jnp.where(tie, size.astype(low.dtype) - 1, high)
        level = level + tie.astype(jnp.int32)
        tied = tied | tie
    return brackets._replace(
        low=low,
        high=high,
        level=level,
        found=found,
        slow_passes=jnp.where(tied, 0, brackets.slow_passes),
        stuck=brackets.stuck & ~tied,
    )


def distances(
    reached: Integers, exceeded: Integers, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """How far above k the one count is, and how far below it the other."""
    return (reached - blocks.k).to_float(), (blocks.k - exceeded).to_float()


def thresholds(
    brackets: Brackets, positions: jax.Array, blocks: Blocks
) -> list[jax.Array]:
    """What stands at the positions; where a block is finished, what was found.

    Returns:
      The value of each threshold and the digits of its cut: it selects magnitudes
      above the value, and those equal to it of an index below the cut.
    """
    positions = jnp.where(unfinished(brackets, blocks), positions, brackets.low)
    level, found = brackets.level, brackets.found
    rows = [jnp.where(level == 0, positions, found[0])]
    for digit, sizes in enumerate(blocks.sizes):
        size = jnp.asarray(sizes, positions.dtype)
        later = size if digit == 0 else jnp.zeros_like(size)
        cut = size - 1 - found[min(digit + 1, len(found) - 1)]
        cut = jnp.where(level > digit + 1, cut, later)
        rows.append(jnp.where(level == digit + 1, size - positions, cut))
    return rows
