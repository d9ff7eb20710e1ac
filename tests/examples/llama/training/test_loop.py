"""What `train` can be given besides the settings, and what it tells of its cost."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from examples import compilation
from examples.llama.checkpoints.loading import load_model
from examples.llama.evaluation.instructions import Check
from examples.llama.evaluation.knowledge import Probe
from examples.llama.evaluation.questions import load_items
from examples.llama.model.loss import next_token_loss
from examples.llama.model.sharding import make_mesh
from examples.llama.text.tokenizer import load_tokenizer
from examples.llama.training.loop import train
from examples.llama.training.optimizers import scale_by_given_learning_rate
from tests.examples.llama.runs import config_of, metrics_of, tensors_of


def momentum(config):
    assert config.alpha == 0.1
    return optax.chain(optax.trace(0.9), scale_by_given_learning_rate())


def test_an_optimizer_of_ones_own(files, run, tmp_path):
    output, result = run("sgd", method="sgd")
    config = config_of(files, tmp_path / "own", method="adamw")
    found = train(config, progress=False, optimizer=momentum)
    assert found["after"] == result["after"]
    assert tensors_of(tmp_path / "own" / "model") == tensors_of(output / "model")


def by_value(config):
    """Steps whose size is the batch's loss times the learning rate."""

    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda u: value * jnp.sign(u), updates), state

    by_loss = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    return optax.chain(by_loss, scale_by_given_learning_rate())


def test_an_optimizer_gets_the_loss(files, tmp_path):
    config = config_of(files, tmp_path / "run", steps=1, schedule="constant")
    result = train(config, progress=False, optimizer=by_value)
    loss = metrics_of(config.output)[1]["loss"]
    entries = json.loads((config.output / "run.json").read_text())["parameters"]
    moved = result["after"]["touched"] * entries
    expected = loss * config.learning_rate * moved**0.5
    assert result["after"]["distance"] == pytest.approx(expected, rel=1e-4)


def twice(model, batch, *, packed, pretrained):
    total, count = next_token_loss(model, batch, packed=packed)
    same, _ = next_token_loss(pretrained, batch, packed=packed)
    return total + jax.lax.stop_gradient(same), count


def test_a_loss_of_ones_own(files, run, tmp_path):
    """Before the first step the model is the pretrained one, and its loss the same."""
    output, result = run("adamw", method="adamw")
    config = config_of(files, tmp_path / "own", method="adamw")
    found = train(config, progress=False, loss=twice)
    # A constant added changes no gradient.
    assert found["after"]["eval_loss"] == pytest.approx(result["after"]["eval_loss"])
    lines, usual = metrics_of(config.output), metrics_of(output)
    assert lines[1]["loss"] == pytest.approx(2 * usual[1]["loss"])


def test_known_measures_are_not_measured_again(files, run, tmp_path):
    _, result = run("adamw", method="adamw")
    before = result["before"] | {"eval_loss": 123.0}
    config = config_of(files, tmp_path / "known", method="adamw")
    found = train(config, progress=False, before=before)
    assert found["before"] == before and metrics_of(config.output)[0] == {
        "step": 0,
        **before,
    }
    assert found["after"] == result["after"]


@pytest.mark.slow
def test_rates_seeds_and_lengths_share_one_program(files, tmp_path):
    config = config_of(files, tmp_path / "first", steps=2)
    others = {"learning_rate": 3e-3, "seed": 1, "steps": 3, "schedule": "linear"}
    with compilation.kept_in(tmp_path / "compiled"):
        steps, sizes = [], []
        for name, changes in (("first", {}), ("second", others)):
            output = tmp_path / name
            config = dataclasses.replace(config, output=output, **changes)
            sizes.append(train(config, progress=False)["bytes"])
            jax.clear_caches()
            names = [path.name for path in (tmp_path / "compiled").iterdir()]
            steps.append({name for name in names if "train_step" in name})
    assert len(steps[0]) > 0 and steps[0] == steps[1]
    assert sizes[0] == sizes[1]  # also of a program that was not compiled here


def test_what_a_run_costs(files, run, tmp_path):
    _, plain = run("adamw", method="adamw")
    _, sgd = run("sgd", method="sgd")
    assert plain["preparing"] == pytest.approx(0, abs=1e-2)
    assert 0 < sgd["bytes"] < plain["bytes"]
    options = {"method": "adamw", "regularize": ("ewc:1",), "fisher_data": "self"}
    config = config_of(files, tmp_path / "ewc", **options, self_replay_rows=8)
    ewc = train(config, progress=False)
    assert ewc["preparing"] > 0
    # Pretrained parameters and Fisher information are as large as the parameters.
    parameters = sum(len(x) for x in tensors_of(config.output / "model").values())
    assert ewc["bytes"] > plain["bytes"] + parameters


def test_lora_over_float16(files, tmp_path):
    """What trains is float32, and the frozen weights are in no optimizer."""
    options = {"lora_rank": 2, "param_dtype": "float16", "learning_rate": 3e-2}
    result = train(config_of(files, tmp_path / "run", **options), progress=False)
    assert result["after"]["eval_loss"] < result["before"]["eval_loss"] - 0.1


ITEMS = [
    {"prompt": "the cat sat on the", "choices": ["mat", "hat"], "answer": "mat"},
    {"prompt": "1", "choices": ["a!", "b!", "ab!"], "answer": "ab!", "relation": "x"},
    {"question": "1", "choices": ["!", "0"], "answer": "!"},
]


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_rank": 2, "lora_merge": True}, {"mesh": "fsdp=2,tensor=2"}],
)
def test_knowledge_and_instructions(files, tmp_path, changes, monkeypatch):
    checks = "examples.llama.evaluation.instructions.CHECKS"
    monkeypatch.setattr(checks, (Check("left out", "Hi", "!"), Check("number", "Ho")))
    for name in ("instructions", "short_answers"):
        module = f"examples.llama.evaluation.{name}"
        monkeypatch.setattr(f"{module}.MAX_NEW_TOKENS", 4)
    items = tmp_path / "items.jsonl"
    items.write_text("\n".join(json.dumps(item) for item in ITEMS))
    model = tmp_path / "model"
    shutil.copytree(files["model"], model)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    output = tmp_path / "run"
    changes = {"model": model, "steps": 2, "eval_every": 1} | changes
    asked = {"knowledge": str(items), "instructions": True, "report": True}
    result = train(config_of(files, output, **changes, **asked), progress=False)
    for measures in (result["before"], result["after"]):
        assert 3 * measures["knowledge"] in (0, 1, 2, 3)
        assert measures["answers"] in (0, 1)
        assert measures["instructions"] in (0, 0.5, 1)
    plain = load_model(output / "model")
    probe = Probe(
        load_items(str(items)),
        load_tokenizer(model),
        make_mesh("fsdp=1"),
        max_position_embeddings=64,
    )
    assert result["after"]["knowledge"] == probe.right(*nnx.split(plain)).mean()
    described = json.loads((output / "run.json").read_text())["knowledge"]
    assert described == load_items(str(items)).describe()
    page = (output / "report.html").read_text()
    assert "Knowledge kept" in page and "Short answers right" in page
    assert "Instructions obeyed" in page
