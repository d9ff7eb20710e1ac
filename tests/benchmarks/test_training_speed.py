"""The benchmark's command on a model that steps in milliseconds."""

import json
from pathlib import Path

import pytest

from benchmarks import training_speed
from benchmarks.training_speed import Args, measure, table
from tests.examples.llama.training import CONFIG


def test_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(training_speed.SHAPES, "tiny", CONFIG)
    output = tmp_path / "speed.json"
    args = Args(output=output, shapes=("tiny",), length=16, repeats=2, torch=False)
    results = measure(args)
    assert json.loads(output.read_text()) == json.loads(json.dumps(results))
    assert "tiny: 100%" in capsys.readouterr().err
    found = results["shapes"]["tiny"]
    assert found.keys() == {"adamw", "mofo"}
    assert found["adamw"]["time_over_our_adamw"] == 1
    for values in found.values():
        assert values["tokens_per_second"] > 0 and 0 < values["mfu"] < 1
    rows = table(results).splitlines()
    assert len(rows) == 3 and rows[2].split()[:2] == ["tiny", "mofo"]


@pytest.mark.parametrize(("share", "length"), [(0.5, 8), (1.0, 1), (0.25, 12)])
def test_prompts(tmp_path, share, length):
    args = Args(output=tmp_path, length=16, answer_share=share)
    assert training_speed.prompt_length(args) == length


@pytest.mark.parametrize("name", ["training_speed", "training_speed_intel"])
def test_published_results(name):
    """The guide quotes the numbers of the files."""
    root = Path(__file__).parents[2]
    results = json.loads((root / f"docs/results/{name}.json").read_text())
    guide = (root / "docs/fine_tuning.md").read_text()
    for name, found in results["shapes"].items():
        cells = [f"{found[key]['tokens_per_second']:,.0f}" for key in found]
        ratio = found["torch"]["time_over_our_adamw"]
        assert f"| {name} | {' | '.join(cells)} | {ratio:.2f} |" in guide
