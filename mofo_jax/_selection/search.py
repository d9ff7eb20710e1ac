"""The search for thresholds that exactly k entries of a block reach, by counting.

Entries of a block are ranked without ties, by magnitude first and index second, and a
threshold is a pair of both. One loop searches for all blocks of a tree: each pass
counts, for every block, the entries at or above a probe or several, and narrows the
bracket that holds the threshold. Where a probe falls is a matter of speed alone: a
bracket rests on counts, and the search ends where a count equals k.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mofo_jax._selection import counting
from mofo_jax._selection.brackets import State, narrow, narrow_to, next_digit, start
from mofo_jax._selection.candidates import Gathered
from mofo_jax._selection.counting import Limbs
from mofo_jax._selection.probes import first_probes, next_probes
from mofo_jax._selection.ranking import Blocks


class Threshold(NamedTuple):
    """Selects magnitudes above value, and those equal to it of an index below cut.

    Attributes:
      value: magnitudes as integers.
      cut: digits of an index; the size of the first digit is all.
    """

    value: jax.Array
    cut: tuple[jax.Array, ...]


class Request(NamedTuple):
    """What to find out of each block.

    Attributes:
      threshold: count the entries that reach it, ``[probes, blocks]``...
      mode: int32, COUNT; or GATHER, if instead the magnitudes of the bracket may be
        gathered; or DONE, if nothing is asked any more.
      low: the bracket's lower end.
      high: its upper end.
      need: which largest of the magnitudes in the bracket is searched for.
      candidates: how many magnitudes the bracket has.
    """

    threshold: Threshold
    mode: jax.Array
    low: jax.Array
    high: jax.Array
    need: jax.Array
    candidates: jax.Array


# What is asked of one block of a unit is done for all, and so the last of these.
DONE, GATHER, COUNT = range(3)


def search(
    look: Callable[[jax.Array], tuple[Limbs, Gathered | None]],
    pack: Callable[[Request], jax.Array],
    blocks: Blocks,
    k: Limbs,
    guess: jax.Array,
    probes: int,
) -> jax.Array:
    """Thresholds that exactly k entries reach.

    Args:
      look: Answers requests that were packed: how many entries of each block reach the
        thresholds, ``[probes, blocks]``, and what was gathered, ``[1, blocks]``.
      pack: Makes one array of a request.
      blocks: The blocks.
      k: ``[1, blocks]``, entries to select, from 1 to the block's size.
      guess: ``[1, blocks]``, magnitudes to start from, -1 for none.
      probes: How many thresholds a pass counts for.

    Returns:
      The last request, packed, in which all probes of a block are the same.
    """
    state = start(blocks, k, guess)
    first = first_probes(blocks, guess, probes)

    def unfinished(carry: Any) -> jax.Array:
        return jnp.any(~counting.equal(carry[0].reached, k))

    def step(carry: Any) -> Any:
        state, positions, packed = carry
        counts, gathered = look(packed)
        before = state
        state = narrow(state, positions, counts, k)
        if gathered is not None:
            state = narrow_to(state, before, gathered)
        state = next_digit(state, blocks, k)
        positions, state = next_probes(state, blocks, k, probes)
        return state, positions, pack(_request(state, positions, blocks, k))

    carry = (state, first, pack(_request(state, first, blocks, k)))
    _, _, packed = lax.while_loop(unfinished, step, carry)
    return packed


def _request(state: State, positions: jax.Array, blocks: Blocks, k: Limbs) -> Request:
    """To count at the positions; where a block is finished, the threshold found."""
    live = ~counting.equal(state.reached, k)
    positions = jnp.where(live, positions, state.low)
    value = jnp.where(state.level == 0, positions, state.found[0])
    cut = []
    for digit, sizes in enumerate(blocks.sizes):
        size = jnp.asarray(sizes, positions.dtype)
        later = size if digit == 0 else jnp.zeros_like(size)
        cut.append(
            jnp.where(
                state.level == digit + 1,
                size - positions,
                jnp.where(
                    state.level > digit + 1,
                    size - 1 - state.found[min(digit + 1, len(state.found) - 1)],
                    later,
                ),
            )
        )
    held = counting.subtract(state.reached, state.exceeded)
    few = counting.to_float(held) <= jnp.asarray(blocks.few, jnp.float32)
    possible = (blocks.few > 0) & (state.level == 0) & ~state.gathered
    gather = possible & (few | state.stuck)
    mode = jnp.where(live, jnp.where(gather, GATHER, COUNT), DONE)
    need = counting.subtract(k, state.exceeded)[-1]
    threshold = Threshold(value, tuple(cut))
    high = jnp.where(live, state.high, state.low)  # nothing to narrow where it is done
    return Request(threshold, mode, state.low, high, need, held[-1])
