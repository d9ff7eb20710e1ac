"""Brackets of thresholds, and how counts narrow them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mofo_jax._selection import counting
from mofo_jax._selection.candidates import Gathered
from mofo_jax._selection.counting import Limbs
from mofo_jax._selection.ranking import Blocks


class State(NamedTuple):
    """Brackets, on the digit of the threshold that is being searched for.

    Positions count upwards as ranks do: magnitudes, then indices from the last down.
    At least k entries reach low, and fewer than k exceed high.
    """

    low: jax.Array
    high: jax.Array
    reached: Limbs  # number of entries that reach low
    exceeded: Limbs  # number of entries that exceed high
    level: jax.Array  # 0 while the magnitude is searched, then 1 + the index's digit
    found: tuple[jax.Array, ...]  # positions of the digits already found
    run: jax.Array  # passes in sequence that did not bring a count much nearer to k
    stuck: jax.Array  # whether the last pass told no candidates apart
    gathered: jax.Array  # whether the last pass gathered magnitudes
    hint: jax.Array  # one of these to try next, and the one after it, or -1
    leap: jax.Array  # grows while one end of the bracket is unknown


def start(blocks: Blocks, k: Limbs, guess: jax.Array) -> State:
    kind, shape = guess.dtype, guess.shape
    zero = jnp.zeros(shape, kind)
    state = State(
        low=zero,
        high=jnp.asarray(blocks.top, kind),
        reached=counting.limbs(blocks.n, len(k)),
        exceeded=tuple(jnp.zeros(shape, jnp.uint32) for _ in k),
        level=jnp.zeros(shape, jnp.int32),
        found=(zero,) * len(blocks.sizes),
        run=jnp.zeros(shape, jnp.int32),
        stuck=jnp.zeros(shape, bool),
        gathered=jnp.zeros(shape, bool),
        hint=zero - 1,
        leap=jnp.ones(shape, jnp.float32),
    )
    varied: State = vary(state, varying_axes(guess))
    return varied


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """Manual mesh axes of shard_map along which x varies."""
    return tuple(sorted(jax.typeof(x).manual_axis_type.varying))


def vary(tree: Any, axes: tuple[str, ...]) -> Any:
    """The arrays, marked as varying along the axes, which a loop's carry must be."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in axes if a not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def narrow(state: State, positions: jax.Array, counts: Limbs, k: Limbs) -> State:
    """Brackets after the counts at some positions."""
    live = ~counting.equal(state.reached, k)
    low, high, reached, exceeded = state[:4]
    for probe in range(positions.shape[0]):
        position = positions[probe : probe + 1]
        count = tuple(limb[probe : probe + 1] for limb in counts)
        enough = ~counting.less(count, k)
        up = live & enough & (position > low)
        down = live & ~enough & (position <= high)
        low, reached = jnp.where(up, position, low), counting.where(up, count, reached)
        high = jnp.where(down, position - 1, high)
        exceeded = counting.where(down, count, exceeded)
    before = jnp.minimum(*distances(state.reached, state.exceeded, k))
    slow = jnp.minimum(*distances(reached, exceeded, k)) > before / 4
    same = counting.equal(reached, state.reached)
    return state._replace(
        low=low,
        high=high,
        reached=reached,
        exceeded=exceeded,
        run=jnp.where(slow, state.run + 1, 0),
        stuck=live & same & counting.equal(exceeded, state.exceeded),
        gathered=jnp.zeros_like(state.gathered),
        hint=jnp.full_like(state.hint, -1),
    )


def narrow_to(counted: State, before: State, gathered: Gathered) -> State:
    """Brackets where magnitudes were gathered, not counted."""
    value, *numbers = gathered
    # One limb: blocks with more entries are not gathered.
    seen, reached, exceeded = ((*before.exceeded[:-1], number) for number in numbers)
    add = lambda number: (*before.exceeded[:-1], before.exceeded[-1] + number[-1])
    candidates = counting.subtract(before.reached, before.exceeded)
    done = gathered.reached > 0
    exact = done & counting.equal(seen, candidates)
    new = before._replace(
        low=jnp.where(exact, value, before.low),
        high=jnp.where(exact, value, before.high),
        reached=counting.where(exact, add(reached), before.reached),
        exceeded=counting.where(exact, add(exceeded), before.exceeded),
        gathered=jnp.ones_like(before.gathered),
        hint=jnp.where(exact | (value <= before.low), -1, value),
    )
    merged: State = jax.tree.map(lambda a, b: jnp.where(done, a, b), new, counted)
    return merged


def next_digit(state: State, blocks: Blocks, k: Limbs) -> State:
    """Goes on to the index where a bracket of one magnitude holds more than k."""
    low, high, level, found = state.low, state.high, state.level, state.found
    tied = jnp.zeros_like(state.stuck)
    for _ in blocks.sizes:
        tie = (low == high) & ~counting.equal(state.reached, k)
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
    return state._replace(
        low=low,
        high=high,
        level=level,
        found=found,
        run=jnp.where(tied, 0, state.run),
        stuck=state.stuck & ~tied,
        hint=jnp.where(tied, -1, state.hint),
    )


def distances(reached: Limbs, exceeded: Limbs, k: Limbs) -> tuple[jax.Array, jax.Array]:
    """How far above k the one count is, and how far below it the other."""
    over = counting.to_float(counting.subtract(reached, k))
    return over, counting.to_float(counting.subtract(k, exceeded))
