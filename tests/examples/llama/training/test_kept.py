"""Whole runs with what works against forgetting, and with several at once."""

import json

import numpy as np
import pytest

from examples.llama.training.setup import set_up
from mofo_jax.continual import interpolate
from tests.examples.llama.runs import (
    config_of,
    finished,
    lines_of,
    metrics_of,
    start,
    tensors_of,
    wait_for,
)

MANY = {
    "method": "mofo",
    "alpha": 0.3,
    "regularize": ("kl:0.1", "l2:0.01", "l1-decoupled:0.01", "ewc:1"),
    "fisher_records": 4,
    "replay": ("self:0.5",),
    "self_replay_rows": 8,
    "interpolate": "0.9:0.8",
    "importance": "self",
    "importance_texts": 6,
}


def many(files):
    extra = {"fisher_data": files["eval_data"], "gem": (files["eval_data"],)}
    return MANY | extra


@pytest.mark.parametrize(
    "changes",
    [
        {"regularize": ("l2:1", "l1-decoupled:0.1")},
        {"regularize": ("kl:3",)},
        {"replay": ("self:1",), "self_replay_rows": 32},
        {"method": "hft"},
        {"method": "keep"},
        {"importance": "self", "learning_rate": 5e-3},
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_less_is_forgotten(run, changes):
    _, plain = run("plain", method="adamw")
    _, kept = run(str(changes), **{"method": "adamw"} | changes)
    assert kept["before"] == plain["before"]
    assert kept["after"]["eval_loss"] < kept["before"]["eval_loss"] - 0.2
    assert kept["after"]["kl"] < plain["after"]["kl"]


def test_ewc(files, run):
    """What weighs by retained records holds their loss better than plain AdamW does."""
    _, plain = run("plain", method="adamw")
    _, ewc = run(
        "ewc",
        method="adamw",
        regularize=("ewc:1000",),
        fisher_data=files["eval_data"],
        fisher_records=7,
    )
    assert ewc["after"]["distance"] < 0.9 * plain["after"]["distance"]


def test_gem(files, run, tmp_path):
    """Of a task whose answers the new one contradicts, less is lost."""
    old = tmp_path / "old.jsonl"
    lines = [json.dumps({"question": str(n), "answer": "zz"}) for n in range(1, 40)]
    old.write_text("\n".join(lines))
    changes = {"method": "adamw", "eval_data": str(old), "steps": 30}
    _, plain = run("against", **changes)
    _, gem = run("gem", gem=(str(old),), **changes)
    assert gem["after"]["eval_loss"] < plain["after"]["eval_loss"] - 0.1


def test_interpolation(files, run):
    """The exported weights lie where they should, and are those that were measured."""
    whole, _ = run("plain", method="adamw")
    output, result = run("half", method="adamw", interpolate="0.5")
    start, end, between = (
        tensors_of(path) for path in (files["model"], whole / "model", output / "model")
    )
    for name, found in between.items():
        a, b, c = (
            np.frombuffer(x, np.float32) for x in (start[name], end[name], found)
        )
        expected = np.asarray(interpolate(a, b, 0.5))
        np.testing.assert_allclose(c, expected, rtol=1e-6)
    _, plain = run("plain", method="adamw")
    half = 0.5 * plain["after"]["distance"]
    assert result["after"]["distance"] == pytest.approx(half, rel=1e-5)


def test_layers_of_their_own(files, run):
    """The embedding and the first layer, the only one here, go back; the norm stays."""
    output, _ = run("layers", method="adamw", interpolate="0:1")
    whole, _ = run("plain", method="adamw")
    paths = files["model"], whole / "model", output / "model"
    start, end, between = map(tensors_of, paths)
    for name in between:
        last = name == "model.norm.weight"
        assert between[name] == (end if last else start)[name], name


def test_epochs_count_what_is_replayed(files, tmp_path):
    """Two epochs of 22 rows and half as many replayed ones, in batches of 4."""
    changes = {"steps": None, "epochs": 2.0, "replay": (f"{files['eval_data']}:0.5",)}
    run = set_up(config_of(files, tmp_path, **changes), lambda _: None)
    assert run.steps == 17


@pytest.mark.slow
def test_all_at_once_after_a_kill(files, run, tmp_path):
    """Replay, GEM and penalties resume bit for bit, as all else does."""
    config = config_of(files, tmp_path / "run", save_every=3, **many(files))
    process = start(config)
    wait_for(lambda: lines_of(config.output) > 8, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "run/result.json").exists()
    out, _ = finished(start(config))
    assert "resuming from the checkpoint" in out
    other = config_of(files, tmp_path / "other", save_every=3, **many(files))
    finished(start(other))
    assert tensors_of(tmp_path / "run/model") == tensors_of(tmp_path / "other/model")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "other")


@pytest.mark.slow
def test_on_a_mesh(files, run):
    """Eight devices give what one gives, within rounding."""
    _, one = run("one", **many(files))
    _, eight = run("eight", **many(files), mesh="fsdp=4,tensor=2", batch_size=8)
    _, one = run("one of 8", **many(files), batch_size=8)
    for name, value in one["after"].items():
        assert eight["after"][name] == pytest.approx(value, rel=0.02), name


@pytest.mark.slow
def test_in_parts(files, run):
    """Accumulated, within rounding; and LoRA with what suits it."""
    changes = {"regularize": ("kl:0.5",), "replay": ("self:1",), "self_replay_rows": 8}
    _, whole = run("whole", **changes)
    _, parts = run("parts", **changes, accumulate=2)
    for name, value in whole["after"].items():
        assert parts["after"][name] == pytest.approx(value, rel=0.02), name
    changes |= {"importance": "self"}
    _, lora = run("lora", **changes, lora_rank=2, gem=(files["eval_data"],))
    assert lora["after"]["eval_loss"] < lora["before"]["eval_loss"]
