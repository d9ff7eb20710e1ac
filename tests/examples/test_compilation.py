"""The time that compiling takes is told from the rest."""

import time

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.compilation import Stopwatch, covered


@jax.jit
def inner(x):
    time.sleep(0.3)  # while it is traced
    return 2 * x


@jax.jit
def outer(x):
    time.sleep(0.3)
    return inner(x) + 1


def test_stopwatch_leaves_out_tracing_and_compiling():
    watch, begun = Stopwatch(), time.perf_counter()
    for _ in range(2):  # blocks add up
        with watch:
            outer(jnp.ones(3)).block_until_ready()
            time.sleep(0.1)
    elapsed = time.perf_counter() - begun
    assert elapsed > 0.8
    assert 0.2 <= watch.seconds < elapsed - 0.5
    seconds = watch.seconds
    jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert watch.seconds == seconds


places = st.integers(0, 30)


@given(st.lists(st.tuples(places, places).map(sorted)))
def test_covered_counts_each_place_once(spans):
    inside = {place for begin, end in spans for place in range(begin, end)}
    assert covered(map(tuple, spans)) == pytest.approx(len(inside))
