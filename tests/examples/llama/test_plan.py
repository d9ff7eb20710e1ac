"""What is planned is what the trainer then compiles."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest

from examples import chips
from examples.chips import Chips
from examples.llama import plan
from examples.llama.checkpoints.huggingface_config import to_hugging_face
from examples.llama.model.sharding import make_mesh
from examples.llama.training import ahead
from examples.llama.training.ahead import compile_ahead, costs
from examples.llama.training.loop import train
from examples.llama.training.steps import peak_bytes
from tests.examples.llama.runs import CONFIG, config_of, write_files

ROOT = Path(__file__).parents[3]
TPU = ROOT / "build" / "tpu" / "bin" / "python"
TOY = Chips("gpu", "1x1x4", "", 4, memory=1e6, flops=1e12)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def toy(monkeypatch):
    """A machine whose chips are the simulated devices."""
    monkeypatch.setitem(chips.CHIPS, "toy", TOY)
    monkeypatch.setattr(ahead, "devices", lambda *_: jax.devices())


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "adamw"},
        {"method": "mofo", "mesh": "fsdp=2,tensor=2"},
        {"method": "keep", "accumulate": 2, "pack": True},
        {"method": "keep", "lora_rank": 2, "dtype": "bfloat16"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_it_is_the_step_of_a_run(files, tmp_path, changes):
    config = config_of(files, tmp_path, steps=1, **changes)
    trained = train(config, progress=False)
    planned = compile_ahead(config, CONFIG, make_mesh(config.mesh))
    assert peak_bytes(planned.compiled) == trained["bytes"]


def test_costs(toy, files, tmp_path):
    config = config_of(files, tmp_path, method="mofo")
    found = costs("toy", config, CONFIG)
    memory = found["memory"]
    count = sum(
        x.size for x in jax.tree.leaves(
            compile_ahead(config, CONFIG, make_mesh("fsdp=1")).state.params
        )
    )  # fmt: skip
    # Norms, and what four does not divide, are whole everywhere.
    assert count <= memory["parameters"] < 1.5 * count
    assert memory["pretrained"] == memory["parameters"]
    assert 2 * memory["parameters"] < memory["optimizer"] < 2.1 * memory["parameters"]
    assert memory["step"] > 0
    assert found["tokens"] == config.batch_size * config.max_length
    assert found["collective_bytes"] > 0
    assert found["seconds"] is None
    plain = dataclasses.replace(config, reference=False)
    assert costs("toy", plain, CONFIG)["memory"]["pretrained"] == 0


def test_seconds(toy, files, tmp_path, monkeypatch):
    """The clock's, of all turns of all loops, and attention at the chip's peak."""
    parts = {"step": {"cycles": 10}, "pass": {"cycles": 100}, "turn": {"cycles": 1000}}
    monkeypatch.setattr(ahead, "describe", lambda _: {**parts, "collective_bytes": 0})
    monkeypatch.setitem(chips.CHIPS, "toy", TOY._replace(clock=100, flops=1e30))
    config = config_of(files, tmp_path, method="mofo")
    found = costs("toy", config, CONFIG)
    assert found["seconds"] == pytest.approx((10 + 6 * 100 + 4 * 1000) / 100)


def test_what_does_not_fit(toy, files, tmp_path, monkeypatch):
    def compiled(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 of 16 GB\nmore")

    monkeypatch.setattr(ahead, "compile_ahead", compiled)
    found = costs("toy", config_of(files, tmp_path), CONFIG)
    assert found == {"does_not_fit": "RESOURCE_EXHAUSTED: 17 of 16 GB"}
    text = plan.table(results({"chips": "toy", "method": "adamw"} | found))
    assert "| toy | adamw | no | RESOURCE_EXHAUSTED: 17 of 16 GB |" in text


def results(run):
    settings = dict.fromkeys(("model", "rows", *plan.FLAGS), "x")
    return {"settings": settings, "versions": {"jax": "1"}, "plans": [run]}


def test_table(toy):
    parts = {"parameters": 1e5, "optimizer": 2e5, "pretrained": 1e5, "step": 3e5}
    run = {"chips": "toy", "method": "mofo", "memory": parts, "tokens": 1000}
    run |= {"collective_bytes": 2e9, "seconds": 0.25}
    row = plan.table(results(run)).splitlines()[-1]
    assert row.startswith("| toy | mofo | yes | 0.0 of 0.001 | 0.00 |")
    assert row.endswith("| 2.00 | 0.250 | 4,000 |")
    large = run | {"memory": parts | {"step": 7e5}, "seconds": None}
    assert "| no | 0.0 of 0.001 |" in plan.table(results(large))


def test_command(monkeypatch, tmp_path, capsys):
    """All machines and methods, with the trainer's settings; a file and a table."""
    asked = []

    def ask(args, shape, chips, method):
        asked.append((chips, method, shape.hidden_size))
        return {"does_not_fit": "RESOURCE_EXHAUSTED: too large"}

    monkeypatch.setattr(plan, "_ask", ask)
    output = tmp_path / "plan.json"
    argv = ["--model", "smollm2-135m", "--chips", "v5e-1", "h100", "--methods"]
    plan.main([*argv, "mofo", "keep", "--pack", "--output", str(output)])
    pairs = [(c, m) for c in ("v5e-1", "h100") for m in ("mofo", "keep")]
    assert asked == [(*pair, 576) for pair in pairs]
    written = json.loads(output.read_text())
    assert written["settings"]["pack"] and written["settings"]["max_length"] == 1024
    assert [(run["chips"], run["method"]) for run in written["plans"]] == pairs
    text = output.with_suffix(".md").read_text()
    assert plan.table(written) == text and text in capsys.readouterr().out


def flags(**changes):
    given = {"model": "smollm2-135m", "chips": "v5e-4", "methods": "adamw"} | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chips": "v9"}, "chips must be among v5e-1, .*; got 'v9'"),
        ({"methods": "adam"}, "methods must be among adamw, .*; got 'adam'"),
        ({"model": "nothing"}, "model must be a directory or one of .*'nothing'"),
        ({"rows": 0}, "rows must be 1 or above, got 0"),
        ({"remat": "some"}, "remat must be among none, dots, full; got 'some'"),
        (
            {"python": "/bin/false"},
            "/bin/false cannot compile for v5e-4: it says nothing; .* jax.tpu.$",
        ),
    ],
)
def test_errors(changes, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        plan.main(flags(**changes))
    last = capsys.readouterr().err.splitlines()[-1]  # a bar may come before it
    assert re.search(f"plan: {message}", last)


@pytest.mark.skipif(not TPU.exists(), reason="needs make accelerators")
def test_a_tpu(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(to_hugging_face(CONFIG)))
    output = tmp_path / "plan.json"
    plan.main(flags(model=tmp_path, methods="mofo", python=TPU, output=output))
    (found,) = json.loads(output.read_text())["plans"]
    assert found["seconds"] > 0
    assert "| v5e-4 | mofo | yes |" in capsys.readouterr().out
