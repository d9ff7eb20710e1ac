"""The benchmark of loading measures a real load, and its results meet the limit."""

import json
from pathlib import Path

import pytest

from benchmarks import load_memory
from benchmarks.load_memory import main, report

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "load_memory.json"


def test_results():
    results = json.loads(RESULTS.read_text())
    assert results["architecture"] == "tinyllama-1.1b" and not results["tiny"]
    assert results["files"] > 1
    assert results["checkpoint_bytes"] > 2 * 1.1e9
    dtypes = [run["param_dtype"] for run in results["runs"]]
    assert {"bfloat16", "float32"} <= set(dtypes)
    for run in results["runs"]:
        assert run["ratio"] == run["peak_bytes_over_baseline"] / run["model_bytes"]
        assert 1 < run["ratio"] <= 1.2
    assert report(results).endswith("At most 1.2 times the model: met.")
    results["runs"][-1]["ratio"] = 1.21
    assert report(results).endswith("At most 1.2 times the model: NOT met.")


def test_a_tiny_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load_memory, "RUNS", (("bfloat16", "fsdp=2"),))
    path = tmp_path / "new" / "results.json"
    main(["--output", str(path), "--tiny", "--file-bytes", "10000000"])
    results = json.loads(path.read_text())
    (run,) = results["runs"]
    assert results["files"] > 2
    assert 0 <= results["checkpoint_bytes"] - run["model_bytes"] < 10_000
    # Reading it all costs at least the model, and less than the interpreter.
    assert 0.9 < run["ratio"] < 10
    assert f"| bfloat16 | fsdp=2 | {run['model_bytes'] / 1e6:,.0f} |" in (
        capsys.readouterr().out
    )


def test_unknown_architecture(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "x.json"), "--architecture", "gpt2"])
    assert (
        "architecture must be among smollm2-135m, llama2-7b" in capsys.readouterr().err
    )
