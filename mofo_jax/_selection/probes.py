"""Where to count next: a matter of speed alone."""

import jax
import jax.numpy as jnp
import numpy as np

from mofo_jax._selection import counting
from mofo_jax._selection.brackets import State, distances
from mofo_jax._selection.counting import Limbs
from mofo_jax._selection.ranking import Blocks

# How much the logarithm of the count falls as a threshold rises by one octave: 2.2 is
# a normal distribution's at its upper tenth. Only the first steps rely on it.
_FALL = 2.2
# Passes of little progress before the bracket is divided evenly.
_PATIENCE = 3


def first_probes(blocks: Blocks, guess: jax.Array, probes: int) -> jax.Array:
    """Around the guess; without one, octaves apart."""
    kind = guess.dtype
    middle = (0.45 * blocks.top).astype(kind)
    near = (_places(probes, 0.01, 0.002, 0.02) * blocks.octave).astype(kind)
    far = (_places(probes, 8, 8, 24) * blocks.octave).astype(kind)
    positions = jnp.where(guess < 0, middle + far, guess + near)
    return jnp.clip(positions, 1, jnp.asarray(blocks.top, kind))


def next_probes(
    state: State, blocks: Blocks, k: Limbs, probes: int
) -> tuple[jax.Array, State]:
    """Where to count next: ``[probes, blocks]`` positions inside the brackets."""
    low, high = state.low, state.high
    kind = low.dtype
    span = (high - low).astype(jnp.float32) + 1
    target = counting.to_float(k)
    reached = counting.to_float(state.reached)
    exceeded = counting.to_float(state.exceeded)
    over, under = distances(state.reached, state.exceeded, k)
    candidates = jnp.maximum(over + under, 1)
    n = counting.to_float(counting.limbs(blocks.n, len(k)))

    # Between two counts: where k would be if the logarithm of the count fell evenly,
    # which it nearly does over magnitudes; over an index the count itself does. That
    # many candidates fall at random, hence the root.
    above = jnp.log1p(over / target)
    below = -jnp.log1p(-jnp.minimum(under, target - 0.5) / target)
    fraction = jnp.where(
        state.level == 0, above / jnp.maximum(above + below, 1e-30), over / candidates
    )
    near = jnp.minimum(over, under)
    error = (jnp.sqrt(near) + 0.002 * near) / candidates
    # Few candidates are best told apart by probes that divide their range.
    error = jnp.minimum(error, 1 / 12)
    fractions = fraction + error * _places(probes, 2, 0.5, 2).astype(np.float32)
    # Steps of equal width where that does not help: on values with many ties, say.
    evenly = state.stuck | (state.run >= _PATIENCE)
    steps = (np.arange(1, probes + 1) / (probes + 1))[:, None].astype(np.float32)
    fractions = jnp.where(evenly, steps, fractions)
    inside = jnp.round(jnp.clip(fractions, 0, 1 - 2.0**-23) * span).astype(kind)

    # Beyond the only count: as far as the usual shape of a distribution says, then
    # in leaps that grow.
    no_low, no_high = (
        (end == start) & (state.level == 0)
        for end, start in (
            (low, jnp.zeros_like(low)),
            (high, jnp.asarray(blocks.top, kind)),
        )
    )
    count = jnp.where(no_high, reached, exceeded)
    octave = jnp.asarray(blocks.octave, jnp.float32)
    apart = 1.25 * jnp.abs(jnp.log(jnp.maximum(count, 0.5) / target)) + 2 / target
    apart = jnp.where((count == 0) | (count == n), 1.0, jnp.minimum(apart / _FALL, 4))
    away = apart * octave * state.leap
    factors = {2: [0.7, 1.2], 4: [0.9, 1.4, 4.0, 32.0]}[probes]
    away = away * np.array(factors, np.float32)[:, None]
    outside = jnp.minimum(away, span * (1 - 2.0**-23)).astype(kind)

    one_sided = no_low | no_high
    positions = jnp.where(
        one_sided, jnp.where(no_high, low + outside, high + 1 - outside), low + inside
    )
    next_to = np.arange(probes, dtype=np.dtype(kind))[:, None]
    positions = jnp.where(state.hint >= 0, state.hint + next_to, positions)
    positions = jnp.minimum(jnp.maximum(positions, low + 1), high)
    return positions, state._replace(
        run=jnp.where(evenly, 0, state.run),
        leap=jnp.where(one_sided, 8 * state.leap, state.leap),
    )


def _places(probes: int, two: float, inner: float, outer: float) -> np.ndarray:
    """Places of two or four probes around an estimate."""
    places = {2: [-two, two], 4: [-outer, -inner, inner, outer]}
    return np.array(places[probes])[:, None]
