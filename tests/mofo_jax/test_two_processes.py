"""Two real processes, over the loopback: the mask of one, and nothing gathered."""

import json
from pathlib import Path

import numpy as np
import pytest

from mofo_jax import top_fraction_mask
from tests.processes import run_pair

pytestmark = pytest.mark.thorough

PROGRAM = Path(__file__).with_name("two_processes.py")


def test_a_leaf_sharded_over_two_processes(tmp_path):
    run_pair(PROGRAM, tmp_path)
    x = np.round(np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32), 1)
    expected = np.asarray(top_fraction_mask(x, 0.13, method="top_k"))
    parts = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    mask = np.concatenate([part["mask"] for part in parts])
    np.testing.assert_array_equal(mask, expected)
    # Of the gradient that is also the first momentum; zeros have no update.
    moved = np.concatenate([part["moved"] for part in parts])
    np.testing.assert_array_equal(moved, expected & (x != 0))

    for rank in range(2):
        moved = json.loads((tmp_path / f"{rank}.json").read_text())
        assert moved
        for kind, arrays, _ in moved:
            assert kind == "all-reduce"
            assert arrays and all(shape == [] for _, shape in arrays)
