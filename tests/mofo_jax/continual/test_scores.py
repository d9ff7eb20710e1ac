"""Scores of a sequence of tasks, on matrices that can be done by hand."""

import numpy as np
import pytest

from mofo_jax.continual import (
    backward_transfer,
    forward_transfer,
    overall_performance,
)

R = [[90.0, 20.0, 10.0], [70.0, 80.0, 30.0], [60.0, 65.0, 85.0]]


def test_by_hand():
    assert overall_performance(R) == pytest.approx((60 + 65 + 85) / 3)
    assert backward_transfer(R) == pytest.approx(((60 - 90) + (65 - 80)) / 2)
    before = [5.0, 10.0, 25.0]
    assert forward_transfer(R, before) == pytest.approx(((20 - 10) + (30 - 25)) / 2)


def test_only_needed_entries_are_needed():
    r = np.array(R)
    r[0, 1:] = r[1, 2] = r[1, 0] = np.nan
    assert overall_performance(r) == overall_performance(R)
    assert backward_transfer(r) == backward_transfer(R)
    with pytest.raises(ValueError, match="no missing entry"):
        forward_transfer(r, [0, 0, 0])
    r[2, 0] = np.nan
    with pytest.raises(ValueError, match="no missing entry"):
        overall_performance(r)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"square matrix of 1 or more tasks"):
        overall_performance([[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"square matrix of 2 or more tasks"):
        backward_transfer([[1.0]])
    with pytest.raises(ValueError, match=r"before must have shape \(3,\)"):
        forward_transfer(R, [1.0])
