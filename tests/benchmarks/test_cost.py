"""The cost benchmark runs, and the README quotes its file."""

import json
import re
from pathlib import Path

import jax
import pytest

from benchmarks import cost, cost_report
from examples.environment import environment

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "cost.json"


@pytest.mark.slow
def test_all_sections_run_and_are_kept(tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "cost.json"
    argv = ["--output", str(output), "--tiny", "--repeats", "2"]
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes of its own
        cost.main(argv)
    table = output.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 10_000
    results = json.loads(output.read_text())
    assert set(cost.sections()) <= set(results)
    assert results["communication"]["FSDP"]["passes"] > 0
    assert all(r["a_pass"] > 0 for r in results["communication"].values())
    # Started again, nothing is measured again.
    monkeypatch.setattr(cost, "time_in_turns", None)
    cost.main(argv)
    assert json.loads(output.read_text()) == results


def test_bad_arguments(tmp_path, capsys):
    output = tmp_path / "cost.json"
    settings = {"repeats": 2, "tiny": True}
    written = json.dumps({"settings": settings} | environment() | {"device": "abacus"})
    output.write_text(written)
    for flags, message in (
        (["--repeats=0"], "repeats must be 1 or above, got 0"),
        (["--sections", "nine"], "sections must be among compilation, "),
        (["--tiny", "--repeats=2"], "of other settings, device 'abacus' instead of"),
        ([f"--output={tmp_path / 'x.txt'}"], "output must end in .json"),
    ):
        with pytest.raises(SystemExit):
            cost.main([f"--output={output}", *flags])
        assert message in capsys.readouterr().err
    assert output.read_text() == written


@pytest.mark.parametrize("path", [RESULTS, RESULTS.with_stem("cost_h200")])
def test_table_is_that_of_the_results(path):
    results = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == cost_report.table(results)
    assert not results["settings"]["tiny"] and results["settings"]["repeats"] >= 15


def test_readme_quotes_the_results():
    results = json.loads(RESULTS.read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    quoted = re.search(r"A step takes ([\d.]+) to ([\d.]+) times", readme)
    ratios = [
        results[f"step: {tree}: ordinary"]["mofo"]["ratio"] for tree in cost.STEPS
    ]
    assert [float(x) for x in quoted.groups()] == [
        round(min(ratios), 2),
        round(max(ratios), 2),
    ]
    hardest = max(
        r["mofo"]["ratio"] for n, r in results.items() if n.startswith("step")
    )
    assert f"up to {hardest:.2f} times" in readme
    share = 100 * (results["fine-tuning"]["mofo"]["ratio"] - 1)
    assert f"takes {share:.1f}% longer" in readme


def test_docs_hold_the_table():
    docs = (ROOT / "docs" / "selection.md").read_text()
    for line in RESULTS.with_suffix(".md").read_text().splitlines()[2:]:  # no title
        assert line in docs
