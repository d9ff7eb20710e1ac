"""Directories that one process has to itself, and files that are whole."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from examples.files import locked, replacing, sha256
from tests import processes

HOLDS = """
import sys, time
from pathlib import Path
from examples.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """A process that holds the lock of `tmp_path / "out"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "out")],
        env=processes.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_one_process_at_a_time(tmp_path, owner):
    output = tmp_path / "out"
    message = f"{output}: process {owner.pid} on {socket.gethostname()} is writing"
    with pytest.raises(ValueError, match=re.escape(message)), locked(output):
        pytest.fail("both have the lock")
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with locked(output):  # what a dead process left does not matter
        assert [path.name for path in output.iterdir()] == [".lock"]


def test_nothing_is_left_but_what_was_written(tmp_path):
    with locked(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("x")
    with locked(tmp_path / "a" / "b"):
        pass
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="no more"), replacing(path) as beside:
        beside.write_text("half")
        raise OSError("no more")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_digest(tmp_path):
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty").startswith("e3b0c44298fc1c149afbf4c8996fb924")
