"""Comparisons at matched losses, on curves that are known."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mofo_jax.continual import (
    bootstrap_interval,
    compare_at_loss,
    pareto_frontier,
    value_at_loss,
)


def test_frontier_by_hand():
    """A point that learns less and forgets more than another one is left out."""
    points = [(3.0, 1.0), (2.0, 1.5), (2.5, 1.2), (2.1, 1.6), (2.6, 1.2)]
    expected = [[2.0, 1.5], [2.5, 1.2], [3.0, 1.0]]
    assert pareto_frontier(points).tolist() == expected


def test_frontier_of_accuracies_ends_at_the_largest_loss():
    points = [(-3.0, 0.9), (-2.0, 0.95), (-1.0, 0.8)]
    found = pareto_frontier(points, larger_is_better=True)
    assert found.tolist() == [[-3.0, 0.9], [-2.0, 0.95], [-1.0, 0.95]]
    assert value_at_loss([found], -1.5) == [0.95]
    assert np.isnan(value_at_loss([found], 0.0))


numbers = st.integers(-20, 20).map(lambda x: x / 4)  # few, so that some are equal


@hypothesis.given(st.lists(st.tuples(numbers, numbers), min_size=1), st.booleans())
def test_frontier(points, larger):
    found = pareto_frontier(points, larger_is_better=larger)
    losses, values = found.T
    best = max if larger else min
    # At each of its losses: the best value of the points with that loss or less.
    for loss, value in found:
        assert value == best(v for x, v in points if x <= loss)
    assert np.all(np.diff(losses) > 0)
    assert losses[-1] == max(x for x, _ in points)
    assert set(map(tuple, found[:-1])) <= set(points)
    if len(found) > 1:
        at_points = [value_at_loss([found], x)[0] for x in losses]
        np.testing.assert_allclose(at_points, values, rtol=1e-12, atol=1e-12)
        middle = value_at_loss([found], losses[:2].mean())[0]
        assert min(values[:2]) - 1e-12 <= middle <= max(values[:2]) + 1e-12


def test_a_convex_curve_between_its_points():
    """Nearer to the curve than its chord is."""
    x = np.array([1.0, 1.5, 2.0, 2.5])
    curve = [np.stack([x, (3 - x) ** 2], axis=1)]
    found = value_at_loss(curve, 1.75)[0]
    exact, chord = 1.25**2, (1.5**2 + 1) / 2
    assert abs(found - exact) < abs(chord - exact) / 2
    assert np.isnan(value_at_loss(curve, 0.9)).all()


def test_intervals_cover_the_mean():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        low, high = bootstrap_interval(rng.normal(size=20), rng)
        hits += low < 0 < high
    assert 50 <= hits <= 60


def test_intervals_by_hand():
    # A quarter of the resamples of two values has the first alone, a quarter the last.
    assert bootstrap_interval([1.0, 3.0]) == (1.0, 3.0)
    assert bootstrap_interval([2.0] * 5) == (2.0, 2.0)
    assert np.isnan(bootstrap_interval([2.0])).all()
    values = np.linspace(0.1, 0.9, 20)
    again = np.random.default_rng(0)
    assert bootstrap_interval(values) == bootstrap_interval(values, again)
    assert bootstrap_interval(values) != bootstrap_interval(values, again)  # advanced


def line(low, high, shift):
    return [[low, 5 - low + shift], [high, 5 - high + shift]]


CURVES = {
    "adam": [line(1, 3, 0.0), line(1, 3, 0.5), line(1, 3, 0.25)],
    "mofo": [line(1, 3, -0.5), line(1, 3, 0.25)],
    "lora": [line(2, 3, 0.0), line(1, 3, 0.0)],
}


def test_compared_by_hand():
    found = compare_at_loss(CURVES, "adam", 1.5)
    assert list(found) == ["adam", "mofo"]  # one seed of LoRA does not learn as much
    mofo = found["mofo"]
    assert mofo.seeds == 2
    assert mofo.mean == pytest.approx(3.5 + (-0.5 + 0.25) / 2)
    assert mofo.gap == pytest.approx((-0.5 - 0.25) / 2)
    assert mofo.interval == pytest.approx((-0.5, -0.25))
    assert found["adam"].gap == 0 and found["adam"].interval == (0, 0)
    assert found["adam"].seeds == 3
    assert list(compare_at_loss(CURVES, "adam", 2.5)) == list(CURVES)
    assert compare_at_loss(CURVES, "lora", 1.5) == {}


def test_baselines_of_their_own():
    baselines = {"adam": "adam", "mofo": "adam", "lora": "mofo"}
    found = compare_at_loss(CURVES, baselines, 2.5)
    assert found["lora"].gap == pytest.approx((0.5 - 0.25) / 2)


def test_methods_without_seeds_are_left_out():
    assert list(compare_at_loss(CURVES | {"none": []}, "adam", 1.5)) == ["adam", "mofo"]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"points must have shape \[P, 2\].*got \[2\]"):
        pareto_frontier([1.0, 2.0])
    with pytest.raises(ValueError, match=r"one or more points, got \[0\]"):
        pareto_frontier([])
    with pytest.raises(ValueError, match=r"points must be finite, got .* in row 1"):
        pareto_frontier([[1.0, 2.0], [np.nan, 2.0]])
    with pytest.raises(
        ValueError, match=r"curve\[1\] must have strictly rising losses"
    ):
        value_at_loss([[[1.0, 2.0]], [[2.0, 1.0], [1.0, 2.0]]], 1.0)
    with pytest.raises(ValueError, match=r"values must be one or more finite numbers"):
        bootstrap_interval([1.0, np.nan])
    with pytest.raises(
        ValueError, match=r"one of adam, mofo, lora, got 'sgd' for adam"
    ):
        compare_at_loss(CURVES, "sgd", 1.0)
    with pytest.raises(ValueError, match=r"got None for mofo"):
        compare_at_loss(CURVES, {"adam": "adam"}, 1.0)
