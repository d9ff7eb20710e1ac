"""Results that a benchmark resumes, or refuses."""

import json

import pytest

from benchmarks.outputs import load

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
