"""The cost of a training step, of a small model; and the documents quote its file."""

import json
from pathlib import Path

import pytest

from benchmarks import cost_fine_tuning
from benchmarks.cost_fine_tuning import METHODS, main, table
from benchmarks.training_step import SHAPES
from tests.examples.llama.runs import CONFIG, write_files

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "cost_fine_tuning.json"
FLAGS = ["--shapes", "tiny", "--batch-size=2", "--length=16", "--repeats=2"]


def test_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", CONFIG)
    write_files(tmp_path)
    output = tmp_path / "new" / "cost.json"
    argv = [f"--output={output}", *FLAGS, "--clock=cpu", "--texts=2"]
    main([*argv, f"--model={tmp_path / 'model'}"])
    results = json.loads(output.read_text())
    text = output.with_suffix(".md").read_text()
    assert text == table(results) and text in capsys.readouterr().out
    assert str(tmp_path) not in output.read_text()
    shape, fisher = results["shapes"]["tiny"], results["fisher"]
    assert shape["methods"].keys() == set(METHODS)
    adamw, keep = (shape["methods"][name] for name in ("adamw", "keep"))
    assert adamw["ratio"] == 1 and adamw["quartiles"] == [1, 1]
    low, high = keep["quartiles"]
    assert 0 < low <= keep["ratio"] <= high
    # Two moments, and the count of the steps and of Adam's.
    assert 0 <= adamw["state_bytes"] - 2 * shape["parameter_bytes"] < 16
    # The information is among the inputs of the step.
    assert keep["peak_bytes"] > shape["fisher_bytes"]["factored"]
    full = shape["fisher_bytes"]["full, float32"]
    assert 0 < shape["fisher_bytes"]["factored"] < full == shape["parameter_bytes"]
    assert fisher["parameters"] == shape["parameters"] and 4 <= fisher["tokens"] <= 32
    assert min(fisher[key]["seconds"] for key in ("drawing", "gradients")) > 0
    # Started again, nothing is measured again.
    monkeypatch.setattr(cost_fine_tuning, "measure_shape", None)
    main(argv)
    assert json.loads(output.read_text()) == results


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--shapes=15M", "shapes must be among 260K, 24M, 125M, "),
        ("--clock=sun", "clock must be among wall, cpu; got 'sun'"),
        ("--repeats=0", "repeats must be 1 or above, got 0"),
        ("--output=x.txt", "output must end in .json"),
    ],
)
def test_bad_arguments(tmp_path, capsys, flag, message):
    with pytest.raises(SystemExit, match="2"):
        main([f"--output={tmp_path / 'x.json'}", flag])
    assert message in capsys.readouterr().err


def test_documents_hold_the_table():
    results = json.loads(RESULTS.read_text())
    text = table(results)
    assert RESULTS.with_suffix(".md").read_text() == text
    assert results["shapes"].keys() >= {"260K", "24M"} and "fisher" in results
    guide = " ".join((ROOT / "docs" / "fine_tuning.md").read_text().split())
    for line in text.splitlines():
        assert not line.startswith("|") or line in guide
    fisher = results["fisher"]
    drawing, gradients = (fisher[x]["steps"] for x in ("drawing", "gradients"))
    assert (
        f"from {fisher['texts']} texts of up to {results['settings']['length']} tokens "
        f"took the model of {fisher['parameters']:,} parameters as long as "
        f"{fisher['steps']:.1f} of AdamW's steps: {drawing:.1f} for writing the texts "
        f"and {gradients:.1f} for their gradients"
    ) in guide
    readme = " ".join((ROOT / "README.md").read_text().split())
    small, large = (
        results["shapes"][name]["methods"]["keep"] for name in ("260K", "24M")
    )
    share = 100 * (large["ratio"] - 1)
    assert f"with `--method keep` takes {share:.1f}% longer than AdamW's" in readme
    assert abs(small["ratio"] - 1) < 0.01  # "about as long"
    for name in ("260K", "24M"):
        adamw, keep = (
            results["shapes"][name]["methods"][x]["peak_bytes"]
            for x in ("adamw", "keep")
        )
        assert keep <= adamw  # "no more memory"
