"""Two real processes, over the loopback: the mask of one, and nothing gathered."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from mofo_jax import top_fraction_mask

PROGRAM = Path(__file__).with_name("two_processes.py")


def test_a_leaf_sharded_over_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "")
    one_device = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    environment = os.environ | {"XLA_FLAGS": one_device.strip(), "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(PROGRAM.parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(port), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output

    x = np.round(np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32), 1)
    expected = np.asarray(top_fraction_mask(x, 0.13, method="top_k"))
    parts = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    mask = np.concatenate([part["mask"] for part in parts])
    np.testing.assert_array_equal(mask, expected)
    # Of the gradient that is also the first momentum; zeros have no update.
    moved = np.concatenate([part["moved"] for part in parts])
    np.testing.assert_array_equal(moved, expected & (x != 0))

    for rank in range(2):
        collectives = json.loads((tmp_path / f"{rank}.json").read_text())
        assert collectives
        for arrays, kind in collectives:
            assert kind == "all-reduce"
            assert re.findall(r"\[([\d,]*)\]", arrays).count("") == arrays.count("[")
