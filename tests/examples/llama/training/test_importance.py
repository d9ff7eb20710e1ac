"""What divides the steps of a run: where it comes from, and what it is of LoRA."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from examples.llama.checkpoints.fisher_files import Origin, load_fisher, named_fisher
from examples.llama.checkpoints.loading import load_model
from examples.llama.fisher import main
from examples.llama.model.parameters import named_parameters
from examples.llama.model.sharding import fisher_sharding, make_mesh
from examples.llama.training import importance
from examples.llama.training.importance import Importance, step_sizes
from examples.llama.training.loop import train
from examples.llama.training.setup import set_up
from mofo_jax.continual import FactoredFisher, scale_by_fisher
from tests.examples.llama.runs import config_of, files_below, tensors_of

TEXTS = {"importance": "self", "importance_texts": 5}
UP = "layers.0.mlp.up_proj"


def quiet(_):
    pass


@pytest.fixture(scope="module")
def dense(files, tmp_path_factory):
    """A dense file of the model."""
    path = tmp_path_factory.mktemp("dense") / "fisher.safetensors"
    flags = [f"--model={files['model']}", f"--output={path}", "--dense"]
    main([*flags, "--texts=5", "--max-length=48", "--mesh=fsdp=1"])
    return path


@pytest.fixture(scope="module")
def finished_run(run):
    """A whole run, with a report."""
    output, _ = run("keep", method="keep", importance_texts=5, steps=4, report=True)
    return output


def params_of(files):
    return nnx.split(load_model(files["model"]))[1]


def test_that_of_the_command(files, finished_run, tmp_path):
    """The run makes the file that examples.llama.fisher makes, to the byte."""
    flags = [f"--model={files['model']}", f"--output={tmp_path / 'file'}"]
    main([*flags, "--texts=5", "--max-length=48", "--mesh=fsdp=1"])
    made = finished_run / "importance.safetensors"
    assert (tmp_path / "file").read_bytes() == made.read_bytes()
    assert len((finished_run / "self_replay.jsonl").read_text().splitlines()) == 5
    facts = json.loads((finished_run / "run.json").read_text())
    expected = {"source": "self", "model": "model", "texts": 5, "max_length": 48}
    expected |= {"seed": 0, "temperature": 1.0}
    assert facts["fisher_information"] == expected
    report = (finished_run / "report.html").read_text()
    assert "Where the metric holds still" in report
    assert "5 texts of up to 48 tokens" in " ".join(report.split())


def test_a_file_instead(files, finished_run, tmp_path):
    """It gives the bits of the run that made it; no text is written."""
    source = str(finished_run / "importance.safetensors")
    config = config_of(
        files, tmp_path / "run", method="keep", importance=source, steps=4
    )
    train(config, progress=False)
    assert tensors_of(tmp_path / "run/model") == tensors_of(finished_run / "model")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {"importance.safetensors", "self_replay.jsonl"} & names


def test_read_again_when_a_run_resumes(files, finished_run, tmp_path, monkeypatch):
    changes = {"method": "keep", "importance_texts": 5}
    config = config_of(files, tmp_path, **changes)
    first = set_up(config, quiet)
    assert files_below(tmp_path) == set()
    kept = finished_run / "importance.safetensors"
    (tmp_path / "importance.safetensors").write_bytes(kept.read_bytes())
    # What an earlier part of this run would have left.
    settings = json.loads((finished_run / "config.json").read_text())
    settings |= {"output": str(tmp_path), "steps": config.steps, "report": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(importance, "estimate_fisher", None)  # not to be called
    again = set_up(config, quiet)
    for x, y in zip(
        jax.tree.leaves(first.fixed.importance),
        jax.tree.leaves(again.fixed.importance),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
        assert x.sharding == y.sharding
    assert first.importance.made is not None and again.importance.made is None


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("mesh", ["fsdp=1", "fsdp=4"])
def test_lora(files, dense, tmp_path, factored, mesh):
    """A row of A is weighed as the kernel's row, a column of B as its column."""
    source = TEXTS if factored else {"importance": str(dense)}
    config = config_of(files, tmp_path, lora_rank=2, mesh=mesh, **source)
    run = set_up(config, quiet)
    params = params_of(files)
    whole, _ = load_fisher(dense, params, fisher_sharding(make_mesh("fsdp=1")))
    kernel = np.asarray(named_fisher(whole)[f"{UP}.kernel"])
    found = named_fisher(run.fixed.importance)
    assert found.keys() == named_parameters(run.state.params).keys()
    for name, (n, m), expected in (
        ("lora_a", (16, 2), np.tile(kernel.mean(1)[:, None], (1, 2))),
        ("lora_b", (2, 24), np.tile(kernel.mean(0), (2, 1))),
    ):
        rows, columns = found[f"{UP}.{name}"]
        assert rows.shape == (n,) and columns.shape == (m,)
        outer = np.outer(rows, columns) / np.mean(rows)
        np.testing.assert_allclose(outer, expected, rtol=1e-3)


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"mesh": "fsdp=4"}, {}])
def test_step_sizes(files, dense, tmp_path, changes):
    config = config_of(files, tmp_path, importance=str(dense), **changes)
    run = set_up(config, quiet)
    steps = step_sizes(run.importance, run.state.params)
    total = sum(x["size"] for x in steps.values())
    assert total == sum(x.size for x in jax.tree.leaves(run.state.params))
    mean = sum(x["step"] * x["size"] for x in steps.values()) / total
    assert mean == pytest.approx(1, rel=1e-4)
    assert f"{UP}.kernel" in steps and not any("lora" in name for name in steps)


def test_step_sizes_by_hand():
    """Of Fisher information 3 and 1, relative to the mean of 2: 1.5 and 0.5."""
    params = nnx.State(
        {"a": {"kernel": nnx.Param(jnp.zeros((2, 2)))}, "b": nnx.Param(jnp.zeros(4))}
    )
    factors = FactoredFisher(jnp.full(2, 3.0), jnp.full(2, 3.0))
    leaves = [factors, jnp.ones(4)]
    fisher = jax.tree.unflatten(jax.tree.structure(params), leaves)
    steps = step_sizes(Importance(fisher, "self", Origin("m", 1, 2, 3)), params)
    first, second = 1 / 1.51, 1 / 0.51  # with a damping of 0.01
    mean = (first + second) / 2
    assert steps["a.kernel"]["step"] == pytest.approx(first / mean, rel=1e-5)
    assert steps["b"] == {"step": pytest.approx(second / mean, rel=1e-5), "size": 4}


def test_the_metric_is_that_of_the_library(files, dense, tmp_path):
    """A step of Adam in the trainer is that of Optax's Adam and scale_by_fisher."""
    changes = {"method": "adamw", "importance": str(dense)}
    run = set_up(config_of(files, tmp_path, **changes), quiet)
    params = run.state.params
    with jax.numpy_dtype_promotion("standard"):
        gradients = jax.tree.map(jnp.sin, params)
        updates, _ = run.optimizer.update(
            gradients,
            run.state.opt_state,
            params,
            importance=run.fixed.importance,
            learning_rate=jnp.float32(1e-2),
        )
        expected, _ = scale_by_fisher(run.fixed.importance).update(
            jax.tree.map(jnp.sign, gradients), scale_by_fisher().init(params)
        )
    for found, other in zip(
        jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(found, -1e-2 * other, rtol=1e-2, atol=1e-6)


def test_a_file_of_another_model(files, dense, tmp_path):

    path = tmp_path / "other.safetensors"
    with safe_open(dense, "numpy") as file:
        texts = file.metadata()
    save_file(load_file(dense) | {"norm.scale": np.ones(17, "f4")}, path, texts)
    config = config_of(files, tmp_path / "run", importance=str(path))
    message = f"{path}: tensor norm.scale has shape [17], expected [16] by the model"
    with pytest.raises(ValueError, match=re.escape(message)):
        train(config, progress=False)
    assert not (tmp_path / "run").exists()


def test_several_processes_need_a_file(files, tmp_path, monkeypatch):
    config = config_of(files, tmp_path, method="keep")
    params, mesh = params_of(files), make_mesh("fsdp=1")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="importance self needs one process, or the"):
        importance.find_importance(config, params, mesh)
