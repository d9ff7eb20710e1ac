"""Curves of several seeds, compared where they reach the same loss."""

import numpy as np
from scipy.interpolate import PchipInterpolator

RESAMPLES = 10_000

Curve = np.ndarray  # [seeds, points, 2]: a loss, rising, and what was measured


def at(curve: Curve, loss: float) -> np.ndarray:
    """What each seed's curve has at a loss, [seeds]; NaN outside of it.

    Between the points by a monotone cubic: the chord of a convex curve lies above it,
    which would favour the methods that have more points nearby.
    """
    if curve.shape[1] < 2:
        return np.full(len(curve), np.nan)
    return np.array(
        [
            float(PchipInterpolator(*points.T, extrapolate=False)(loss))
            for points in curve
        ]
    )


def interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of [seeds]; NaN of one seed alone."""
    if len(values) < 2:
        return np.nan, np.nan
    draws = rng.choice(values, size=(RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def span(limits: tuple[float, float], form: str = ".3f") -> str:
    """An interval for a table; nothing where there is none."""
    low, high = limits
    return "" if np.isnan(low) else f"{low:{form}} to {high:{form}}"
