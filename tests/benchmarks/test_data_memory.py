"""The benchmark of many records measures real loads, and its results meet the limit."""

import json
from pathlib import Path

from benchmarks.data_memory import main, report

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "data_memory.json"


def test_results():
    results = json.loads(RESULTS.read_text())
    assert results["records"] == results["later"]["rows"] == 10_000_000
    assert results["later"]["batches"] >= 20_000
    for name in ("first", "later"):
        assert results[name]["peak_bytes"] < 2e9
    assert report(results).endswith("Less than 2 GB: met.")
    results["later"]["peak_bytes"] = 2_100_000_000
    assert report(results).endswith("Less than 2 GB: NOT met.")


def test_a_small_run(tmp_path, capsys):
    path = tmp_path / "results.json"
    main(["--output", str(path), "--records", "2001", "--files", "2", "--batches", "3"])
    results = json.loads(path.read_text())
    assert results["first"]["rows"] == results["later"]["rows"] == 2001
    assert 0 < results["later"]["seconds_per_batch"] < results["later"]["peak_bytes"]
    assert "2,001 records in 0 MB of JSON lines" in capsys.readouterr().out
