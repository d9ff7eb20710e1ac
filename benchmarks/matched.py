"""Curves of several seeds, compared where they reach the same loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

RESAMPLES = 10_000

# Of each seed [points, 2]: a loss, rising, and what was measured.
Curve = Sequence[np.ndarray]


def frontier(points: Sequence[tuple[float, float]], *, rising: bool) -> np.ndarray:
    """The points [., 2] that no other one beats, by their losses.

    A learning rate that is too large learns less and forgets more than a smaller one,
    and nobody would choose it. Up to the largest loss, the last point that is not
    beaten counts.

    Args:
      points: A loss each, and what was measured.
      rising: Whether more of that is better.
    """
    kept: list[tuple[float, float]] = []
    for loss, value in sorted(points, key=lambda p: (p[0], -p[1] if rising else p[1])):
        best = kept[-1][1] if kept else None
        if best is None or (value > best if rising else value < best):
            kept.append((loss, value))
    largest = max(loss for loss, _ in points)
    if largest > kept[-1][0]:
        kept.append((largest, kept[-1][1]))
    return np.array(kept)


def at(curve: Curve, loss: float) -> np.ndarray:
    """What each seed's curve has at a loss, [seeds]; NaN outside of it.

    Between the points by a monotone cubic: the chord of a convex curve lies above it,
    which would favour the methods that have more points nearby.
    """
    return np.array(
        [
            float(PchipInterpolator(*points.T, extrapolate=False)(loss))
            if len(points) > 1
            else np.nan
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


def compare(
    curves: Mapping[str, Curve], base: Mapping[str, str], x: float
) -> dict[str, dict[str, Any]]:
    """Each curve that reaches x: "seeds", "mean", "gap" to its base, and "interval".

    Args:
      curves: By name.
      base: Of a name, that of the curve that it is held against. The gap is taken
        seed by seed, of those that both have. Without its base a curve is left out.
      x: Where to compare.
    """
    rng, found = np.random.default_rng(0), {}
    for name, mine in curves.items():
        other = curves.get(base[name])
        if other is None:
            continue
        seeds = min(len(mine), len(other))
        values = at(mine[:seeds], x)
        gap = values - at(other[:seeds], x)
        if np.isnan(gap).any():
            continue
        found[name] = {
            "seeds": seeds,
            "mean": float(values.mean()),
            "gap": float(gap.mean()),
            "interval": interval(gap, rng),
        }
    return found


def table(
    heads: Sequence[str],
    titles: Mapping[str, Sequence[str]],
    found: Mapping[float, Mapping[str, dict[str, Any]]],
    form: str,
) -> list[str]:
    """Markdown: a row for each name with what `compare` found at several losses.

    Args:
      heads: Over the first columns.
      titles: What a name has in those.
      found: By loss.
      form: Of the numbers, as ".3f".
    """
    places = [f"at {x:.3g} | gap | interval" for x in found]
    lines = [
        f"| {' | '.join([*heads, *places])} |",
        "|---" * (len(heads) + 3 * len(found)) + "|",
    ]
    for name, title in titles.items():
        cells = []
        for rows in found.values():
            row = rows.get(name)
            if row is None:
                cells += ["", "", ""]
            elif row["gap"]:
                gap, limits = row["gap"], row["interval"]
                cells += [f"{row['mean']:{form}}", f"{gap:+{form}}"]
                cells.append(span(limits, f"+{form}"))
            else:  # what the others are held against
                cells += [f"{row['mean']:{form}}", "", ""]
        if any(cells):
            lines.append(f"| {' | '.join([*title, *cells])} |")
    return lines


def span(limits: tuple[float, float], form: str) -> str:
    """An interval for a table; nothing where there is none."""
    low, high = limits
    return "" if np.isnan(low) else f"{low:{form}} to {high:{form}}"
