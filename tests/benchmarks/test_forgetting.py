"""The frontier: runs of a tiny model, and tables of made-up curves that are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import forgetting, forgetting_report
from benchmarks.forgetting import Args, main, measure
from benchmarks.forgetting_methods import METHODS
from benchmarks.suites import SUITES
from examples.llama.text.records import read_records
from examples.llama.training.checks import check
from tests.examples.llama.runs import write_files

SHIFTS = {"adamw": 0.0, "mofo": -0.1, "hft": 0.2}


def made_up(seeds=3):
    """Retained loss 2 + (3 - x)^2 / 4 over held-out losses x, shifted by the method."""
    rng, runs = np.random.default_rng(0), []
    for seed in range(seeds):
        offset = 0.01 * rng.normal()
        for name, shift in SHIFTS.items():
            method = METHODS[name]
            losses = np.linspace(2.8, 1.9, len(method.points)).tolist()
            for x, point in zip(losses, method.points, strict=True):
                x += 3 if name == "hft" else 0
                after = {
                    "eval_loss": x,
                    "retain_loss": 2 + (3 - x) ** 2 / 4 + shift + offset,
                    "kl": (3 - x) ** 2 / 2 + shift,
                    "distance": 1.0,
                    "touched": 0.5,
                }
                runs.append(
                    {
                        "method": name,
                        "point": point,
                        "seed": seed,
                        "after": after,
                        "workers": 1,
                        "seconds": 2.0 if name == "adamw" else 3.0,
                        "preparing": 0.0 if name == "adamw" else 1.0,
                        "bytes": 400 if name == "adamw" else 500,
                        "device": "abacus",
                        "versions": {"jax": "1"},
                    }
                )
    settings = {
        "model": "m",
        "data": "d",
        "eval_data": "e",
        "retain_data": "r",
        "steps": 3,
        "batch_size": 2,
        "max_length": 16,
        "eval_records": 7,
        "rate_scale": 1.0,
    }
    before = {"eval_loss": 9.0, "retain_loss": 2.0, "kl": 0.0}
    return {"settings": settings, "pretrained": before, "runs": runs}


def test_matched_losses():
    found = forgetting_report.matched(made_up(), "retain_loss")
    np.testing.assert_allclose(list(found), [2.125, 2.35, 2.575])
    for loss, rows in found.items():
        assert rows.keys() == {"adamw", "mofo"}  # HFT is elsewhere
        for name, row in rows.items():
            shift = SHIFTS[name]
            mean = 2 + (3 - loss) ** 2 / 4 + shift
            assert row.mean == pytest.approx(mean, abs=0.03) and row.seeds == 3
            # The seeds' offsets are common to both, so that the gap has none.
            assert row.gap == pytest.approx(shift, abs=1e-9)
            assert row.interval == pytest.approx((shift, shift), abs=1e-9)


def test_incomplete_seeds_have_no_curve():
    results = made_up()
    results["runs"] = [
        run for run in results["runs"] if (run["method"], run["seed"]) != ("mofo", 2)
    ]
    results["runs"] = results["runs"][:-1]
    found = forgetting_report.curves(results, "kl")
    assert {name: len(curve) for name, curve in found.items()} == {
        "adamw": 3,
        "mofo": 2,
        "hft": 2,
    }
    rows = forgetting_report.matched(results, "kl")
    assert {found["mofo"].seeds for found in rows.values()} == {2}


def test_where_a_run_diverged_there_is_no_point(tmp_path):
    results = made_up()
    point = METHODS["adamw"].points[-1]
    for run in results["runs"]:
        if (run["method"], run["point"], run["seed"]) == ("adamw", point, 1):
            for name in ("after", "seconds", "preparing", "bytes"):
                del run[name]
            run["diverged"] = True
    found = forgetting_report.measured(results, "kl")
    assert found["adamw"].shape == (3, 4, 2) and found["mofo"].shape == (3, 5, 2)
    rows = forgetting_report.report(results).splitlines()
    row = next(x for x in rows if x.startswith("| AdamW | learning rate 0.0048"))
    assert [x.strip() for x in row.split("|")[3:6]] == ["3", "1 diverged", ""]
    assert row.count("|") == rows[rows.index(row) - 4].count("|")
    forgetting_report.plot(results, tmp_path / "plot.png")


def test_report_and_plot(tmp_path):
    results = made_up()
    text = forgetting_report.report(results)
    assert "39 runs, up to 3 seeds" in text
    rows = text.splitlines()
    row = next(x for x in rows if x.startswith("| MoFO 10%"))
    assert [x.strip() for x in row.split("|")[7:9]] == ["-0.100", "-0.100 to -0.100"]
    assert row.split("|")[2].strip() == "3"
    row = next(x for x in rows if x.startswith("| MoFO 10% | learning rate 0.0006"))
    # A second more than AdamW's two, which are three steps; one more for preparing.
    costs = [x.strip() for x in row.split("|")[-5:-1]]
    assert costs == ["1.50", "2", "2.00", "1.250"]
    # A faster machine, on which the other methods were not run.
    for run in results["runs"]:
        if run["method"] == "adamw" and run["seed"] == 2:
            run |= {"device": "slide rule", "seconds": run["seconds"] / 4}
    assert row in forgetting_report.report(results).splitlines()
    # Runs that were made to be timed.
    results["costs"] = [
        {"method": name, "seconds": seconds, "preparing": 1, "bytes": 8}
        for name, seconds in (("adamw", 3), ("mofo", 6), ("mofo", 4.5))
    ]
    rows = forgetting_report.report(results).splitlines()
    row = next(x for x in rows if x.startswith("| MoFO 10% | learning rate 0.0006"))
    assert [x.strip() for x in row.split("|")[-5:-1]] == ["1.50", "1", "1.83", "1.000"]
    one_rate = text[text.index("## At one") : text.index("## Every")]
    assert one_rate.count("learning rate 0.0024") == 3
    one = forgetting_report.report(made_up(seeds=1)).splitlines()
    row = next(x for x in one if x.startswith("| MoFO 10%"))
    assert [x.strip() for x in row.split("|")[7:9]] == ["-0.100", ""]
    forgetting_report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_kept_is_better_where_it_is_higher(tmp_path):
    """As the retained loss, with its sign changed; in the table, the plot and gaps."""
    results = made_up()
    for measures in (results["pretrained"], *(x["after"] for x in results["runs"])):
        measures["knowledge"] = 1 - measures["retain_loss"] / 10
    assert forgetting_report.shown(results) == ["retain_loss", "kl", "knowledge"]
    lost = forgetting_report.matched(results, "retain_loss")
    for loss, rows in forgetting_report.matched(results, "knowledge").items():
        for name, row in rows.items():
            assert row.mean == pytest.approx(1 - lost[loss][name].mean / 10)
            assert row.gap == pytest.approx(-lost[loss][name].gap / 10, abs=1e-12)
    text = forgetting_report.report(results)
    assert "## Knowledge kept at a matched held-out loss" in text
    assert "above zero where less is forgotten" in text
    rows = text.splitlines()
    head = next(x for x in rows if x.startswith("| method | setting"))
    row = next(x for x in rows if x.startswith("| HFT | learning rate 0.0006"))
    assert head.count("|") == row.count("|")
    column = [x.strip() for x in head.split("|")].index("knowledge kept")
    share = 1 - (2 + (3 - 5.8) ** 2 / 4 + 0.2) / 10
    shown = float(row.split("|")[column].split("%")[0]) / 100
    assert shown == pytest.approx(share, abs=2e-3)
    forgetting_report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_suite_may_ask_for_knowledge(tmp_path, monkeypatch):
    items = tmp_path / "items.jsonl"
    item = {"prompt": "the", "choices": ["cat", "mat"], "answer": "cat"}
    items.write_text(json.dumps(item))
    asking = SUITES["stories260k"]._replace(settings={"knowledge": str(items)})
    monkeypatch.setitem(SUITES, "asking", asking)
    paths = write_files(tmp_path)
    paths["data"] = paths["data"][0]
    paths = {key: Path(path) for key, path in paths.items()}
    args = Args(output=tmp_path / "x.json", suite="asking", **paths)
    before = args.settings()["knowledge"]
    assert before["items"] == 1
    config = args.configuration("adamw", {}, 0, tmp_path / "x", tmp_path / "out")
    assert config.knowledge == str(items)
    items.write_text(json.dumps(item | {"answer": "mat"}))
    assert args.settings()["knowledge"] != before  # so that numbers are not mixed


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_configuration(tmp_path, name):
    paths = write_files(tmp_path)
    paths["data"] = paths["data"][0]
    paths = {key: Path(path) for key, path in paths.items()}
    args = Args(output=tmp_path / "x.json", rate_scale=2.0, **paths)
    held_out = args.held_out(tmp_path)
    for point in METHODS[name].points:
        config = args.configuration(name, point, 3, held_out, tmp_path / "out")
        check(config)
        assert config.seed == 3
        rate = (METHODS[name].common | point)["learning_rate"]
        assert config.learning_rate == 2 * rate


def test_held_out_records(tmp_path):
    """Whole lines, also where a text has characters that end lines elsewhere."""
    records = [{"text": f"{i} \u2028 \x85 \x0b"} for i in range(3)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path = tmp_path / "eval.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    paths = dict.fromkeys(("model", "data", "eval_data", "retain_data"), path)
    args = Args(output=tmp_path / "x.json", eval_records=2, **paths)
    found = read_records(args.held_out(tmp_path)).records
    assert [record.content for record in found] == [r["text"] for r in records[:2]]


@pytest.mark.slow
def test_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    paths = write_files(tmp_path)
    paths["data"] = paths["data"][0]
    output = tmp_path / "results" / "frontier.json"
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in paths.items()]
    flags += ["--methods", "adamw", "wise-ft", "--seeds=1", "--steps=2"]
    for name in ("adamw", "wise-ft"):
        short = METHODS[name]._replace(points=METHODS[name].points[:2])
        monkeypatch.setitem(METHODS, name, short)
    flags += ["--batch-size=4", "--max-length=48", "--eval-records=3"]
    calls = []

    def counted(config, **options):
        calls.append(config)
        if len(calls) == 2:
            config.output.mkdir()
            raise FloatingPointError
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(config, **options)

    train = forgetting.train
    monkeypatch.setattr(forgetting, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        main([*flags, f"--output={output}"])
    assert len(json.loads(output.read_text())["runs"]) == 2
    main([*flags, f"--output={output}"])
    assert len(calls) == 3 + 2
    results = json.loads(output.read_text())
    assert len(results["runs"]) == 4
    assert [run.get("diverged", False) for run in results["runs"]].index(True) == 1
    assert all(run["bytes"] > 0 for run in results["runs"] if "after" in run)
    assert {run["method"] for run in results["runs"]} == {"adamw", "wise-ft"}
    assert output.with_suffix(".png").exists()
    assert output.with_suffix(".md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*flags, f"--output={output}", "--rate-scale=2"])
    message = "frontier.json: of other settings, rate_scale 1.0 instead of 2.0;"
    assert message in capsys.readouterr().err
    main([*flags, f"--output={output}", "--costs=1"])
    main([*flags, f"--output={output}", "--costs=2"])
    timed = json.loads(output.read_text())
    assert timed["runs"] == results["runs"]
    found = [(run["method"], run["round"]) for run in timed["costs"]]
    assert found == [(m, r) for r in (0, 1) for m in ("adamw", "wise-ft")]
    assert all(run["seconds"] > 0 for run in timed["costs"])


@pytest.mark.slow
def test_rivals_in_processes_of_their_own(tmp_path, monkeypatch):
    """Each finds its optimizer or loss by its name, and measures the start once."""
    names = ("padam", "finch", "flow", "eaft")
    for name in names:
        short = METHODS[name]._replace(points=METHODS[name].points[:1])
        monkeypatch.setitem(METHODS, name, short)
    paths = write_files(tmp_path)
    paths["data"] = paths["data"][0]
    paths = {key: Path(path) for key, path in paths.items()}
    small = {"steps": 2, "batch_size": 4, "max_length": 48, "eval_records": 3}
    args = Args(
        **paths, **small, output=tmp_path / "x.json", methods=names, seeds=1, workers=2
    )
    results = measure(args)
    assert {run["method"] for run in results["runs"]} == set(names)
    losses = {run["after"]["eval_loss"] for run in results["runs"]}
    assert (
        len(losses) == len(names) and results["pretrained"]["eval_loss"] not in losses
    )
    assert "before" not in results["runs"][0]
    assert results["runs"] == json.loads(args.output.read_text())["runs"]


def test_ends_in_time(tmp_path, capsys):
    paths = write_files(tmp_path)
    paths["data"] = paths["data"][0]
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in paths.items()]
    main([*flags, f"--output={tmp_path / 'x.json'}", "--minutes=0"])
    methods = SUITES["stories260k"].methods
    runs = 5 * sum(len(METHODS[name].points) for name in methods)
    assert f"0 of {runs} runs" in capsys.readouterr().out
    assert not (tmp_path / "x.json").exists()


def test_bad_arguments(tmp_path):
    paths = {key: tmp_path for key in ("model", "data", "eval_data", "retain_data")}
    args = Args(output=tmp_path / "x.json", methods=("adam",), **paths)
    with pytest.raises(ValueError, match=r"methods must be among adamw, .*'adam'"):
        measure(args)
    for name in ("seeds", "workers"):
        args = Args(output=tmp_path / "x.json", **{name: 0})
        with pytest.raises(ValueError, match=f"{name} must be 1 or above, got 0"):
            measure(args)
    args = Args(output=tmp_path / "x.json", suite="tpu")
    with pytest.raises(ValueError, match=r"suite must be among stories260k, .*'tpu'"):
        measure(args)
    args = Args(output=tmp_path / "x.json", data_dir=(tmp_path,))
    with pytest.raises(
        ValueError, match=r"--model: .*no stories260K.bin in --data-dir"
    ):
        args.paths()
