"""Where to count next: a matter of speed alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mofo_jax._selection.brackets import Brackets, distances
from mofo_jax._selection.ranking import Blocks

# How much the logarithm of the count falls as a threshold rises by one octave: 2.2 is
# a normal distribution's at its upper tenth. Only the first steps rely on it.
_FALL = 2.2


class Places(NamedTuple):
    """Where probes fall, for a number of them.

    Attributes:
      near: The first ones, in octaves around a guess.
      far: Without one, in octaves around the middle.
      inside: In errors of an estimate between two counts.
      outside: Beyond the only count, in times an estimate of how far.
    """

    near: tuple[float, ...]
    far: tuple[float, ...]
    inside: tuple[float, ...]
    outside: tuple[float, ...]


_PLACES = {
    2: Places((-0.01, 0.01), (-8, 8), (-2, 2), (0.7, 1.2)),
    4: Places(
        (-0.02, -0.002, 0.002, 0.02),
        (-24, -8, 8, 24),
        (-2, -0.5, 0.5, 2),
        (0.9, 1.4, 4, 32),
    ),
    8: Places(
        (-0.3, -0.045, -0.012, -0.003, 0.003, 0.012, 0.045, 0.3),
        (-36, -24, -16, -8, 0, 8, 16, 24),
        (-3, -1.6, -0.9, -0.3, 0.3, 0.9, 1.6, 3),
        (0.5, 0.8, 1.0, 1.3, 1.8, 3, 8, 32),
    ),
}
# Passes of little progress before the bracket is divided evenly.
_PATIENCE = 3


def first_probes(blocks: Blocks, guess: jax.Array, probes: int) -> jax.Array:
    """Around the guess; without one, octaves apart. Of 2, 4 or 8 probes."""
    kind = guess.dtype
    middle = (0.45 * blocks.top).astype(kind)
    near, far = (
        (np.array(places)[:, None] * blocks.octave).astype(kind)
        for places in _PLACES[probes][:2]
    )
    positions = jnp.where(guess < 0, middle + far, guess + near)
    return jnp.clip(positions, 1, jnp.asarray(blocks.top, kind))


def next_probes(
    brackets: Brackets, blocks: Blocks, probes: int
) -> tuple[jax.Array, Brackets]:
    """Where to count next: ``[probes, blocks]`` positions inside the brackets.

    Also the brackets, with what the next call has to know of this one.
    """
    low, high = brackets.low, brackets.high
    kind = low.dtype
    span = (high - low).astype(jnp.float32) + 1
    target = blocks.k.to_float()
    reached = brackets.reached.to_float()
    exceeded = brackets.exceeded.to_float()
    over, under = distances(brackets.reached, brackets.exceeded, blocks)
    candidates = jnp.maximum(over + under, 1)
    n = blocks.n.to_float()

    # Between two counts: where k would be if the logarithm of the count fell evenly,
    # which it nearly does over magnitudes; over an index the count itself does. That
    # many candidates fall at random, hence the root.
    above = jnp.log1p(over / target)
    below = -jnp.log1p(-jnp.minimum(under, target - 0.5) / target)
    by_logarithm = above / jnp.maximum(above + below, 1e-30)
    fraction = jnp.where(brackets.level == 0, by_logarithm, over / candidates)
    near = jnp.minimum(over, under)
    error = (jnp.sqrt(near) + 0.002 * near) / candidates
    # Few candidates are best told apart by probes that divide their range.
    error = jnp.minimum(error, 1 / 12)
    places = np.array(_PLACES[probes].inside, np.float32)[:, None]
    fractions = fraction + error * places
    # Steps of equal width where that does not help: on values with many ties, say.
    evenly = brackets.stuck | (brackets.slow_passes >= _PATIENCE)
    steps = (np.arange(1, probes + 1) / (probes + 1))[:, None].astype(np.float32)
    fractions = jnp.where(evenly, steps, fractions)
    inside = jnp.round(jnp.clip(fractions, 0, 1 - 2.0**-23) * span).astype(kind)

    # Beyond the only count: as far as the usual shape of a distribution says, then
    # in leaps that grow.
    no_low, no_high = (
        (end == start) & (brackets.level == 0)
        for end, start in (
            (low, jnp.zeros_like(low)),
            (high, jnp.asarray(blocks.top, kind)),
        )
    )
    count = jnp.where(no_high, reached, exceeded)
    octave = jnp.asarray(blocks.octave, jnp.float32)
    octaves = 1.25 * jnp.abs(jnp.log(jnp.maximum(count, 0.5) / target)) + 2 / target
    octaves = jnp.minimum(octaves / _FALL, 4)
    octaves = jnp.where((count == 0) | (count == n), 1.0, octaves)
    away = octaves * octave * brackets.leap
    away = away * np.array(_PLACES[probes].outside, np.float32)[:, None]
    outside = jnp.minimum(away, span * (1 - 2.0**-23)).astype(kind)

    one_sided = no_low | no_high
    positions = jnp.where(
        one_sided, jnp.where(no_high, low + outside, high + 1 - outside), low + inside
    )
    positions = jnp.minimum(jnp.maximum(positions, low + 1), high)
    return positions, brackets._replace(
        slow_passes=jnp.where(evenly, 0, brackets.slow_passes),
        leap=jnp.where(one_sided, 8 * brackets.leap, brackets.leap),
    )
