"""The search for thresholds that exactly k entries of a block reach, by counting.

Entries of a block are ranked without ties: by magnitude first, and by index among
equals. A threshold is a pair of both, so for every k there is one that exactly k
entries reach.

Every block has a bracket (:mod:`.brackets`): at least k entries reach its lower end,
and fewer than k exceed its upper end. One loop searches for all blocks of a tree. Each
pass of it counts, in every block, the entries that reach a few probes, and moves the
ends of the bracket to the probes. The bracket holds positions of magnitudes until only
one magnitude is left in it, and then positions of the index. A block is finished when a
count is k.

Where the probes fall (:mod:`.probes`) decides how many passes that takes, and nothing
else, as a bracket rests on counts. The first ones lie around a guess: the threshold of
the step before.

How a pass reads the arrays depends on the device, and :class:`Passes` is what the
search asks of it. :mod:`.any_device` counts, on whatever device or mesh the arrays
are, with a little that suits TPUs and one that suits a single GPU. :mod:`.single_cpu`
reads them in the way that a CPU reads fastest, and gathers the last candidates. Another
one needs the same four methods.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mofo_jax._selection.any_device import AnyDevice, OneGPU, TPUs
from mofo_jax._selection.brackets import (
    Brackets,
    next_digit,
    start,
    unfinished,
    vary,
    varying_axes,
)
from mofo_jax._selection.counting import Integers
from mofo_jax._selection.options import options
from mofo_jax._selection.platforms import on_one_device, platform
from mofo_jax._selection.probes import next_probes
from mofo_jax._selection.ranking import Axes, Blocks
from mofo_jax._selection.single_cpu import SingleCPU


class Passes(Protocol):
    """How a kind of device reads the arrays of a search.

    Attributes:
      blocks: The blocks of all arrays, one after the other.
      probes: How many thresholds a pass counts for, 2 or 4.
    """

    blocks: Blocks
    probes: int

    def start(
        self, brackets: Brackets, guess: jax.Array
    ) -> tuple[Brackets, jax.Array, Any]:
        """Brackets, positions to try, and what a pass leaves for the next one.

        Args:
          brackets: Those that hold whatever the arrays are.
          guess: ``[1, blocks]``, magnitudes to start from, -1 for none.
        """

    def request(
        self, brackets: Brackets, positions: jax.Array, memory: Any
    ) -> tuple[jax.Array, jax.Array]:
        """What the next pass shall find out, as one array ``[rows, probes, blocks]``.

        Its first rows are the :func:`.brackets.thresholds`. Also their positions, if
        the memory knows better ones than those given.
        """

    def take(
        self, brackets: Brackets, positions: jax.Array, request: jax.Array
    ) -> tuple[Brackets, Any]:
        """The brackets after a pass over the arrays, and what is to be remembered."""

    def masks(self, thresholds: jax.Array) -> list[jax.Array]:
        """What reaches the thresholds ``[rows, blocks]``, for each array."""


PROGRAMS: dict[str, type[AnyDevice | SingleCPU]] = {
    "any device": AnyDevice,
    "one CPU device": SingleCPU,
    "one GPU": OneGPU,
    "TPUs": TPUs,
}


# Compiled once for each tree of shapes: without jit, eager loops compile at every call.
@functools.partial(jax.jit, static_argnames="block_axes")
def search_masks(
    arrays: list[jax.Array], k: Integers, guess: jax.Array, block_axes: tuple[Axes, ...]
) -> tuple[list[jax.Array], jax.Array]:
    """Marks the k largest entries of each block of the arrays.

    Args:
      arrays: Real arrays, those of one kind side by side.
      k: ``[1, blocks]``, from 1 to the block's size.
      guess: int32 ``[blocks]``, the second result of an earlier call, or -1.
      block_axes: For each array.

    Returns:
      Boolean masks, and the magnitudes that the marked entries reach: int32
      ``[blocks]``, of float64 the upper 32 bits.
    """
    passes = _passes(arrays, list(block_axes), k)
    guess = vary(guess, varying_axes(arrays[0]))[None]
    is_wide = passes.blocks.top.dtype == np.int64
    if is_wide:
        guess = guess.astype(np.int64) << 32
    thresholds = _search(passes, guess)
    values = thresholds[0] >> 32 if is_wide else thresholds[0]
    return passes.masks(thresholds), values.astype(jnp.int32)


def _passes(arrays: list[jax.Array], block_axes: list[Axes], k: Integers) -> Passes:
    """How to read the arrays: the one place where that is chosen.

    A wrong guess, as when lowering for another platform, costs time only.
    """
    name = options.value.program
    if name is None:
        alone = {"cpu": "one CPU device", "gpu": "one GPU"} if on_one_device() else {}
        name = ({"tpu": "TPUs"} | alone).get(platform(), "any device")
    return PROGRAMS[name](arrays, block_axes, k)


def _search(passes: Passes, guess: jax.Array) -> jax.Array:
    """Thresholds that exactly k entries reach.

    Args:
      passes: How the arrays are read.
      guess: ``[1, blocks]``, magnitudes to start from, -1 for none.

    Returns:
      ``[rows, blocks]``: the value of each threshold, and the digits of its cut.
    """
    blocks, probes = passes.blocks, passes.probes
    on_pass = options.value.on_pass

    def any_unfinished(carry: Any) -> jax.Array:
        return jnp.any(unfinished(carry[0], blocks))

    def step(carry: Any) -> Any:
        brackets, positions, request, _ = carry
        if on_pass is not None:
            jax.debug.callback(on_pass, request[0, 0, 0])
        brackets, memory = passes.take(brackets, positions, request)
        brackets = next_digit(brackets, blocks)
        positions, brackets = next_probes(brackets, blocks, probes)
        positions, request = passes.request(brackets, positions, memory)
        return brackets, positions, request, memory

    brackets, positions, memory = passes.start(start(blocks, guess), guess)
    # A loop's carry must vary along the manual mesh axes that its values vary along.
    brackets, memory = vary((brackets, memory), varying_axes(guess))
    positions, request = passes.request(brackets, positions, memory)
    carry = brackets, positions, request, memory
    _, _, request, _ = lax.while_loop(any_unfinished, step, carry)
    return request[: 1 + len(blocks.sizes), 0]
