"""Results that a benchmark resumes, or refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.outputs import load, make_room

SETTINGS = {"settings": {"steps": 3, "model": "m"}, "device": "abacus"}


def test_load(tmp_path):
    path = tmp_path / "x.json"
    assert load(path, SETTINGS) is None
    results = SETTINGS | {"runs": [{"seed": 0, "loss": 1.0}]}
    path.write_text(json.dumps(results))
    assert load(path, SETTINGS, ("seed",)) == results
    assert load(path, {}) == results


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"device": "abacus", "runs": []}',
        json.dumps(SETTINGS),
        json.dumps(SETTINGS | {"runs": 3}),
        json.dumps(SETTINGS | {"runs": [3]}),
        json.dumps(SETTINGS | {"runs": [{"rate": 1}]}),
    ],
)
def test_another_kind(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    message = (
        "x.json: expected a JSON object with settings, device, runs of seed, rate$"
    )
    with pytest.raises(ValueError, match=message):
        load(path, SETTINGS, ("seed", "rate"))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_no_object(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x.json: .*expected a JSON object$"):
        load(path, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "Z3"}, "device 'Z3' instead of 'abacus'"),
        ({"settings": {"steps": 4, "model": "m"}}, "steps 4 instead of 3"),
        ({"settings": {"model": "m"}}, "steps None instead of 3"),
        (
            {"settings": SETTINGS["settings"] | {"dtype": "bfloat16"}},
            "dtype 'bfloat16' instead of None",
        ),
    ],
)
def test_other_settings(tmp_path, changes, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(SETTINGS | changes))
    with pytest.raises(ValueError, match=f"x.json: of other settings, {message};"):
        load(path, SETTINGS)


WRITER = """
import sys, time
from pathlib import Path
from benchmarks.outputs import make_room
make_room(Path(sys.argv[1]))
print("begun", flush=True)
time.sleep(1000)
"""


def test_one_process_writes(tmp_path):
    path = tmp_path / "new" / "x.json"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", WRITER, path]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout.readline() == "begun\n"
        with pytest.raises(ValueError, match=f"x.json: process {one.pid} on .* is wri"):
            make_room(path)
        make_room(path.with_name("y.json"))
        one.kill()
    make_room(path)  # what it left does not matter
    make_room(path)  # nor what this process has itself
