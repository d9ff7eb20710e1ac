"""What is forgotten, compared where methods have learned the same."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_RESAMPLES = 10_000

Array = np.ndarray[Any, np.dtype[np.float64]]


class Comparison(NamedTuple):
    """One method against its baseline at one loss; see :func:`compare_at_loss`.

    Attributes:
      seeds: Number of seeds that both have.
      mean: The method's mean over these seeds, in the unit of its values.
      gap: The mean over these seeds of the method's value less the baseline's.
      interval: The 95% bootstrap interval of the gap; NaN with one seed.
    """

    seeds: int
    mean: float
    gap: float
    interval: tuple[float, float]


def pareto_frontier(points: ArrayLike, *, larger_is_better: bool = False) -> Array:
    """The points that no other point beats in both loss and value.

    A learning rate that is too large learns less and forgets more than a smaller one,
    and nobody would choose it. Up to the largest loss of all points, the value of the
    last point on the frontier counts.

    Args:
      points: [P, 2], finite. Each row is one run of a method: its loss on the new task,
        and a value that says what was forgotten, such as the divergence from the
        pretrained model or the accuracy on an old task.
      larger_is_better: Whether a larger value is the better one, as with an accuracy.
        Of losses, the smaller one is always better.

    Returns:
      float64 [K, 2], by rising loss; values improve from row to row, but for a last row
      that repeats the value at the largest loss.

    Raises:
      ValueError: ``points`` has another shape, is empty, or not finite.

    >>> from mofo_jax.continual import pareto_frontier
    >>> pareto_frontier([[1.0, 0.9], [2.0, 0.4], [1.5, 1.2], [3.0, 0.5]])
    array([[1. , 0.9],
           [2. , 0.4],
           [3. , 0.4]])

    References:
      Lin et al., `Mitigating the Alignment Tax of RLHF
      <https://arxiv.org/abs/2309.06256>`_, 2024, who compare methods by such frontiers.
    """
    rows = _points("points", points)
    sign = -1 if larger_is_better else 1
    kept: list[tuple[float, float]] = []
    for loss, value in sorted(rows.tolist(), key=lambda p: (p[0], sign * p[1])):
        if not kept or sign * value < sign * kept[-1][1]:
            kept.append((loss, value))
    largest = float(rows[:, 0].max())
    if largest > kept[-1][0]:
        kept.append((largest, kept[-1][1]))
    return np.array(kept)


def value_at_loss(curve: Sequence[ArrayLike], loss: float) -> Array:
    """What a method's curve has at a loss, for each seed.

    Between its points, a curve is a monotone cubic. A straight chord would lie above a
    convex curve, which favours methods that have more points nearby.

    Args:
      curve: For each seed [K, 2], finite: losses, strictly rising, and values. See
        :func:`pareto_frontier`.
      loss: Where to read the curve, on the scale of its losses. Use their logarithms
        where they span several orders of magnitude.

    Returns:
      float64 [seeds]. NaN where a seed's losses do not include this one, or where the
      seed has one point alone.

    Raises:
      ValueError: A seed's points have another shape, are empty, not finite, or in
        another order.

    >>> from mofo_jax.continual import value_at_loss
    >>> value_at_loss([[[1.0, 8.0], [2.0, 6.0]], [[1.0, 9.0], [1.2, 7.0]]], 1.5)
    array([ 7., nan])

    References:
      Fritsch and Butland, `A Method for Constructing Local Monotone Piecewise Cubic
      Interpolants <https://doi.org/10.1137/0905021>`_, 1984.
    """
    # Here, because it takes longer to import than the whole library.
    from scipy.interpolate import PchipInterpolator

    values = []
    for seed, points in enumerate(curve):
        rows = _points(f"curve[{seed}]", points)
        if np.any(np.diff(rows[:, 0]) <= 0):
            raise ValueError(
                f"curve[{seed}] must have strictly rising losses, got "
                f"{rows[:, 0].tolist()}"
            )
        if len(rows) == 1:
            values.append(np.nan)
        else:
            interpolator = PchipInterpolator(*rows.T, extrapolate=False)
            values.append(float(interpolator(loss)))
    return np.array(values)


def bootstrap_interval(
    values: ArrayLike, rng: int | np.random.Generator = 0
) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean, by the percentiles of 10,000 resamples.

    With few seeds it is too narrow: of three, it is little more than their range.

    Args:
      values: [N], finite, one for each seed.
      rng: A seed, or a generator, which is advanced.

    Returns:
      Lower and upper limit, in the unit of the values; NaN where N is 1.

    Raises:
      ValueError: ``values`` has another shape, is empty, or not finite.

    >>> from mofo_jax.continual import bootstrap_interval
    >>> low, high = bootstrap_interval([0.1, 0.2, 0.3, 0.2])
    >>> print(f"{low:.3f} to {high:.3f}")
    0.125 to 0.275

    References:
      Efron, `Bootstrap Methods: Another Look at the Jackknife
      <https://doi.org/10.1214/aos/1176344552>`_, 1979.
    """
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or not sample.size or not np.isfinite(sample).all():
        raise ValueError(f"values must be one or more finite numbers, got {values!r}")
    if len(sample) < 2:
        return np.nan, np.nan
    draws = np.random.default_rng(rng).choice(sample, size=(_RESAMPLES, len(sample)))
    low, high = np.quantile(draws.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def compare_at_loss(
    curves: Mapping[str, Sequence[ArrayLike]],
    baseline: str | Mapping[str, str],
    loss: float,
) -> dict[str, Comparison]:
    """Methods compared with a baseline where all have the same loss on the new task.

    How much is forgotten depends first on how much is learned, so at one learning rate
    the method that learns less looks better. At one loss the difference is the
    method's own.

    Args:
      curves: Each method's curve, as in :func:`value_at_loss`. Seeds are paired with
        the baseline's in their order; what one of the two has more is left out.
      baseline: The method to compare all others with, or for each method its own.
      loss: Where to compare.

    Returns:
      By method, in the order of ``curves``, the baseline included (with a gap of 0). A
      method is left out where its curve or its baseline's does not reach the loss with
      every paired seed.

    Raises:
      ValueError: ``baseline`` names no curve, or none for a method; or a curve is not
        as in :func:`value_at_loss`.

    >>> from mofo_jax.continual import compare_at_loss
    >>> adam = [[[1.0, 0.9], [2.0, 0.5]], [[1.0, 1.0], [2.0, 0.6]]]
    >>> mofo = [[[1.0, 0.7], [2.0, 0.5]], [[1.0, 0.6], [2.0, 0.4]]]
    >>> found = compare_at_loss({"adam": adam, "mofo": mofo}, "adam", 1.5)["mofo"]
    >>> found.seeds, round(found.mean, 3), round(found.gap, 3)
    (2, 0.55, -0.2)

    References:
      Efron, `Bootstrap Methods: Another Look at the Jackknife
      <https://doi.org/10.1214/aos/1176344552>`_, 1979 (of the interval).
    """
    if isinstance(baseline, str):
        baseline = dict.fromkeys(curves, baseline)
    rng, found = np.random.default_rng(0), {}
    for name, curve in curves.items():
        if baseline.get(name) not in curves:
            raise ValueError(
                f"baseline must be one of {', '.join(curves)}, got "
                f"{baseline.get(name)!r} for {name}"
            )
        other = curves[baseline[name]]
        seeds = min(len(curve), len(other))
        values = value_at_loss(curve[:seeds], loss)
        gap = values - value_at_loss(other[:seeds], loss)
        if not seeds or np.isnan(gap).any():
            continue
        found[name] = Comparison(
            seeds,
            float(values.mean()),
            float(gap.mean()),
            bootstrap_interval(gap, rng),
        )
    return found


def _points(name: str, points: ArrayLike) -> Array:
    rows = np.asarray(points, np.float64)
    if rows.ndim != 2 or rows.shape[1] != 2 or not len(rows):
        raise ValueError(
            f"{name} must have shape [P, 2] with one or more points, got "
            f"{list(rows.shape)}"
        )
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        first = int(finite.argmin())
        raise ValueError(
            f"{name} must be finite, got {rows[first].tolist()} in row {first}: leave "
            "out runs that diverged"
        )
    return rows
