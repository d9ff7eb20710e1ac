"""What tests need that start processes of their own."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment():
    """This process's, with one CPU device instead of the eight of conftest.py."""
    flags = os.environ.get("XLA_FLAGS", "")
    one_device = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    return os.environ | {"XLA_FLAGS": one_device.strip(), "JAX_PLATFORMS": "cpu"}


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_pair(program, directory):
    """Runs `python program RANK PORT DIRECTORY` twice; returns stdout and stderr."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(port), str(directory)],
            env=environment() | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (out, err) in zip(started, outputs, strict=True):
        assert process.returncode == 0, out + err
    return outputs
