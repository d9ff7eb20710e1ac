"""Scores of a sequence of tasks, learned one after another.

R[t, i] is the score on task i, from 0, after training on task t; more is better.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def overall_performance(scores: ArrayLike) -> float:
    r"""OP: the mean score over all tasks after the last, :math:`\frac1T\sum_i R_{Ti}`.

    Args:
      scores: R, [T, T].

    Returns:
      In the scores' unit.

    Raises:
      ValueError: R is not square, or one of the entries needed is missing (NaN).

    >>> from mofo_jax.continual import overall_performance
    >>> overall_performance([[50.0, 10.0], [40.0, 60.0]])
    50.0

    References:
      Wang et al., `TRACE <https://arxiv.org/abs/2310.06762>`_, 2023.
    """
    return _mean(_square(scores)[-1])


def backward_transfer(scores: ArrayLike) -> float:
    r"""BWT: how earlier tasks' scores changed; below zero is forgetting.

    That is :math:`\frac{1}{T-1}\sum_{i<T} R_{Ti} - R_{ii}`.

    Args:
      scores: R, [T, T], of two tasks or more.

    Returns:
      In the scores' unit.

    Raises:
      ValueError: See :func:`overall_performance`; or there is one task alone.

    >>> from mofo_jax.continual import backward_transfer
    >>> backward_transfer([[50.0, 10.0], [40.0, 60.0]])
    -10.0

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, 2017, equation 3.
    """
    r = _square(scores, least=2)
    return _mean((r[-1] - np.diagonal(r))[:-1])


def forward_transfer(scores: ArrayLike, before: ArrayLike) -> float:
    r"""FWT: what tasks gained before their turn,
    :math:`\frac{1}{T-1}\sum_{i>1} R_{i-1,i} - b_i`.

    Args:
      scores: R, [T, T], of two tasks or more.
      before: b, [T], the scores before any training.

    Returns:
      In the scores' unit.

    Raises:
      ValueError: See :func:`backward_transfer`; or b has another length.

    >>> from mofo_jax.continual import forward_transfer
    >>> forward_transfer([[50.0, 10.0], [40.0, 60.0]], before=[5.0, 4.0])
    6.0

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, 2017, equation 4.
    """
    r, start = _square(scores, least=2), np.asarray(before, float)
    if start.shape != (len(r),):
        raise ValueError(f"before must have shape ({len(r)},), got {start.shape}")
    return _mean(np.diagonal(r, offset=1) - start[1:])


def _square(scores: ArrayLike, least: int = 1) -> np.ndarray[Any, np.dtype[np.float64]]:
    r = np.asarray(scores, np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or len(r) < least:
        raise ValueError(
            f"scores must be a square matrix of {least} or more tasks, got shape "
            f"{r.shape}"
        )
    return r


def _mean(values: Any) -> float:
    if np.isnan(values).any():
        raise ValueError("scores must have no missing entry (NaN) among those needed")
    return float(np.mean(values))
