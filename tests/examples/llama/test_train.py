"""Whole runs of the trainer: what they learn, what they leave behind, how they fail."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tqdm import tqdm

from examples import terminal
from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.checkpoints.safetensors_files import read_header
from examples.llama.model.generation import generate
from examples.llama.text.batches import training_batches
from examples.llama.text.rows import load_dataset, load_text
from examples.llama.text.tokenizer import load_tokenizer, save_tokenizer
from examples.llama.train import main
from examples.llama.training.config import Config
from examples.llama.training.loop import train
from tests.examples.llama.runs import (
    config_of,
    files_below,
    finished,
    flags_of,
    metrics_of,
    start,
    tensors_of,
)

SHOWN = {"samples": 2, "report": True}


def losses_by_hand(model, rows):
    """Losses of the counted tokens in float64, [count], from the model's logits."""
    tokens, mask = rows["tokens"], rows["loss_mask"]
    logits = np.asarray(nnx.jit(lambda m, t: m(t))(model, tokens), np.float64)[:, :-1]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=-1))
    at_targets = np.take_along_axis(shifted, tokens[:, 1:, None], axis=-1)[..., 0]
    return (log_sums - at_targets)[mask[:, 1:]], (shifted - log_sums[..., None])


def numbers(result):
    return result["before"], result["after"]


def test_learns_and_mofo_moves_less(run):
    _, adamw = run("adamw", method="adamw")
    _, mofo = run("mofo", **SHOWN)
    assert adamw["before"] == mofo["before"]
    assert adamw["before"]["distance"] == adamw["before"]["kl"] == 0
    for result in (adamw, mofo):
        assert result["after"]["eval_loss"] < result["before"]["eval_loss"] - 0.5
    for name in ("distance", "touched"):
        assert 0 < mofo["after"][name] < 0.8 * adamw["after"][name]
    # Of the embedding, rows of tokens that occur nowhere get no gradient.
    assert 0.3 < adamw["after"]["touched"] <= 1


def test_numbers_by_hand(files, run):
    output, result = run("mofo", **SHOWN)
    tokenizer = load_tokenizer(files["model"])
    held_out = load_dataset(files["eval_data"], tokenizer, 48)
    retained = load_text(files["retain_data"], tokenizer, 48)
    assert len(held_out) == 7 and len(retained) % 4  # batches of 4
    models = {
        "before": load_model(files["model"]),
        "after": load_model(output / "model"),
    }
    logs = {}
    for when, model in models.items():
        for name, dataset in (("eval_loss", held_out), ("retain_loss", retained)):
            losses, logs[when] = losses_by_hand(model, dataset.take())
            assert result[when][name] == pytest.approx(losses.mean(), rel=1e-5)
    divergence = np.exp(logs["before"]) * (logs["before"] - logs["after"])
    expected = divergence.sum(axis=-1)[retained.take()["loss_mask"][:, 1:]].mean()
    assert result["after"]["kl"] == pytest.approx(expected, rel=1e-4)
    states = [jax.tree.leaves(nnx.state(model)) for model in models.values()]
    first, last = ([np.asarray(x, np.float64) for x in leaves] for leaves in states)
    squares = [np.sum((a - b) ** 2) for a, b in zip(first, last, strict=True)]
    assert result["after"]["distance"] == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
    moved = [np.sum(a != b) for a, b in zip(first, last, strict=True)]
    share = sum(moved) / sum(x.size for x in first)
    assert result["after"]["touched"] == pytest.approx(share, rel=1e-6)
    training = load_dataset(files["data"][0], tokenizer, 48)
    batch = next(training_batches([training], [1.0], 4, 0))
    expected = losses_by_hand(models["before"], batch)[0].mean()
    assert metrics_of(output)[1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_rerun_is_identical_and_writes_nothing_elsewhere(
    files, run, tmp_path, monkeypatch, capsys
):
    output, result = run("mofo", **SHOWN)
    capsys.readouterr()
    inputs, before = files["model"].parent, files_below(files["model"].parent)
    monkeypatch.chdir(tmp_path)
    same = train(config_of(files, tmp_path / "again"), progress=False)
    assert capsys.readouterr() == ("", "")
    assert files_below(inputs) == before
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert numbers(result) == numbers(same)
    outputs = output, tmp_path / "again"
    metrics = [(path / "metrics.jsonl").read_bytes() for path in outputs]
    assert metrics[0] == metrics[1]
    assert tensors_of(output / "model") == tensors_of(tmp_path / "again" / "model")


def test_seed(run):
    _, result = run("adamw", method="adamw")
    _, other = run("seed", method="adamw", seed=1)
    assert other["before"] == result["before"]
    assert other["after"]["eval_loss"] != result["after"]["eval_loss"]


def test_metrics(run):
    output, result = run("mofo", **SHOWN)
    lines = metrics_of(output)
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in trained] == list(range(1, 16))
    names = {"step", "loss", "gradient_norm", "learning_rate"}
    assert [line.keys() for line in trained] == [names] * 15
    assert trained[0]["learning_rate"] == pytest.approx(1e-2)
    assert [line.pop("step") for line in evaluated] == [0, 6, 12, 15]
    assert (evaluated[0], evaluated[-1]) == numbers(result)
    distances = [line["distance"] for line in evaluated]
    assert distances[0] == 0 and len(set(distances)) == 4


def test_tensorboard(run):
    from tensorboardX.proto.event_pb2 import Event

    output, _ = run("mofo", **SHOWN)
    (path,) = (output / "tensorboard").iterdir()
    found, raw = [], path.read_bytes()
    while raw:  # length, its checksum, the event, its checksum
        size = int.from_bytes(raw[:8], "little")
        event = Event.FromString(raw[12 : 12 + size])
        found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
        raw = raw[16 + size :]
    for line in metrics_of(output):
        group = "train" if "loss" in line else "eval"
        for name in line.keys() - {"step"}:
            value = pytest.approx(line[name], rel=1e-6)
            assert (f"{group}/{name}", line["step"], value) in found


def test_what_a_run_leaves(files, run):
    output, result = run("mofo", **SHOWN)
    assert {path.name for path in output.iterdir()} == {
        "checkpoints", "config.json", "inputs.json", "losses.png", "metrics.jsonl",
        "model", "report.html", "result.json", "run.json", "samples.json",
        "tensorboard",
    }  # fmt: skip
    assert json.loads((output / "result.json").read_text()) == result
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    subprocess.run(command, cwd=output / "model", check=True, capture_output=True)
    found = json.loads((output / "config.json").read_text())
    assert found["model"] == str(files["model"]) and found["alpha"] == 0.1
    facts = json.loads((output / "run.json").read_text())
    name = files["data"][0]
    training = load_dataset(name, load_tokenizer(files["model"]), 48)
    assert facts["records"][name] == {
        "rows": len(training),
        "truncated": training.outcome.truncated,
        "dropped": training.outcome.dropped,
        "skipped": 0,
        "escaped": 0,
        "empty": 0,
    }
    assert training.outcome.truncated > 0
    assert facts["steps"] == 15 and facts["versions"]["jax"] == jax.__version__
    sizes = [x.size for x in jax.tree.leaves(nnx.state(load_model(files["model"])))]
    assert facts["parameters"] == facts["trained_parameters"] == sum(sizes)
    assert result["milliseconds_per_step"] == pytest.approx(
        1000 * result["seconds"] / 15
    )
    tokens = result["tokens_per_second"] * result["seconds"]
    assert 15 * 4 * 20 < tokens <= 15 * 4 * 48
    assert 0 < result["mfu"] < 1


def test_sample_answers(files, run):
    """The report's answers are what the exported model says."""
    output, _ = run("mofo", **SHOWN)
    report = (output / "report.html").read_text()
    model = load_model(output / "model")
    tokenizer = load_tokenizer(output / "model")
    first = json.loads(Path(files["eval_data"]).read_text().splitlines()[0])
    prompt = f"<|user|>\n{first['question']}\n<|assistant|>\n"
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    new = generate(
        model,
        np.array([ids]),
        max_new_tokens=64 - len(ids),
        eos_id=tokenizer.eos_ids,
    )
    answer = tokenizer.decode(np.asarray(new)[0].tolist()).strip()
    assert len(answer) > 3 and answer.split("\n")[0] in report


def test_lora(files, run):
    changes = {"lora_rank": 2, "lora_alpha": 8.0, "batch_size": 8, "steps": 10}
    changes |= {"lora_dropout": 0.1, "lora_merge": True, "report": True}
    output, result = run("lora", remat="dots", **changes)
    facts = json.loads((output / "run.json").read_text())
    assert facts["trained_parameters"] < 0.3 * facts["parameters"]
    assert result["after"]["eval_loss"] < result["before"]["eval_loss"]
    # Merged on export: a plain model, whose numbers are those of the run.
    model = load_model(output / "model")
    tokenizer = load_tokenizer(files["model"])
    held_out = load_dataset(files["eval_data"], tokenizer, 48).take()
    losses, _ = losses_by_hand(model, held_out)
    assert result["after"]["eval_loss"] == pytest.approx(losses.mean(), rel=1e-4)
    pretrained = tensors_of(files["model"])
    same = {n for n, x in tensors_of(output / "model").items() if x == pretrained[n]}
    assert same == {n for n in pretrained if "norm" in n or "embed" in n}
    # The adapter beside it is the same, not merged.
    adapter = load_model(files["model"], adapter=output / "adapter")
    losses, _ = losses_by_hand(adapter, held_out)
    assert result["after"]["eval_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    settings = json.loads((output / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(files["model"].resolve())
    assert settings["lora_dropout"] == 0.1 and (settings["r"], settings["lora_alpha"])
    assert (output / "adapter/tokenizer.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "down_proj"])
def test_lora_of_some_projections(files, run, targets):
    """A bfloat16 base with a MoFO filter, an importance and a penalty; no model."""
    output, result = run(
        f"lora {targets}", lora_rank=2, lora_targets=targets, param_dtype="bfloat16",
        method="keep", importance_texts=4, regularize=("kl:0.1",), report=True,
    )  # fmt: skip
    assert result["after"]["eval_loss"] < result["before"]["eval_loss"]
    facts = json.loads((output / "run.json").read_text())
    kernels = 2 * 16 * 16 if targets == "q_proj,v_proj" else 24 * 16
    touched = result["after"]["touched"] * facts["parameters"]
    assert 0.1 * kernels < touched < 1.001 * kernels
    assert not (output / "model").exists()
    tensors = read_header(output / "adapter/adapter_model.safetensors")
    assert {x.dtype for x in tensors.values()} == {"F32"}
    assert {name.split(".")[-3] for name in tensors} == set(targets.split(","))
    report = (output / "report.html").read_text()
    assert "Where the metric holds still" in report


def test_many_options_together(files, run):
    """Packing, parts, bfloat16, remat, Lion and the tokenizer's chat template."""
    template = files["model"] / "chat_template.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    try:
        output, result = run(
            "many", method="mofo-lion", learning_rate=3e-4, pack=True, accumulate=2,
            dtype="bfloat16", moments_dtype="bfloat16", remat="dots", clip_norm=1.0,
            schedule="linear", warmup_steps=2, template="tokenizer", steps=None,
            epochs=3.0, export_dtype="bfloat16", data=files["data"] * 2, samples=1,
        )  # fmt: skip
    finally:
        template.unlink()
    facts = json.loads((output / "run.json").read_text())
    rows = facts["records"][files["data"][0]]["rows"]
    assert rows < 22 and facts["steps"] == math.ceil(3.0 * 2 * rows / 4)
    assert result["after"]["eval_loss"] < result["before"]["eval_loss"]
    assert "BF16" in str((output / "model" / "model.safetensors").read_bytes()[:2000])


def test_without_anything_to_compare_with(files, run):
    output, result = run("bare", reference=False, eval_data=None, steps=4)
    assert result["before"].keys() == {"retain_loss"}
    output, result = run(
        "barest", eval_data=None, retain_data=None, steps=2, samples=1, report=True
    )
    assert result["before"] == {"distance": 0, "touched": 0}
    assert (output / "report.html").exists()


# Errors

BAD = [
    (
        {"method": "adagrad"},
        "method must be one of adamw, sgd, mofo, lion, mofo-lion, gain, gradient,",
    ),
    ({"batch_size": 6, "mesh": "fsdp=4"}, "must be a multiple of 4, over which the"),
    ({"max_length": 65}, "max_length must be up to the model's 64, got 65"),
    ({"warmup_steps": 15}, "warmup_steps must be below 15 steps, got 15"),
    ({"mesh": "fsdp=99"}, "mesh 'fsdp=99' has 99 devices, found 8"),
    ({"data": ("absent",)}, "No such file or directory: 'absent'"),
    ({"data": (".",)}, ".: no file called .jsonl or .json in it"),
    ({"model": Path("empty")}, "empty: expected model.safetensors, or model.saf"),
    ({"data": ("note",)}, "note, line 1: "),
    ({"data": ("hf:",)}, "'hf:' names no data set; expected hf:NAME[:CONFIG][:SPLIT]"),
    ({"seed": 99999999999999999999}, "seed must be 0 to 4294967295, got 9999999999999"),
    (
        {"distributed": True, "coordinator": "localhost"},
        "coordinator must be HOST:PORT, got 'localhost'",
    ),
    ({"lora_rank": 99}, "lora_rank must be 1 to 16, got 99"),
    ({"output": Path("full")}, "full: not empty, and it holds no run to resume"),
    ({"output": Path("/proc/absent")}, "No such file or directory: '/proc/absent'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_errors(files, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note").write_text("something else")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    before = sorted(tmp_path.rglob("*"))
    config = config_of(files, Path("out"), **changes)
    with pytest.raises(SystemExit) as caught:
        main([*flags_of(config), f"--tokenizer={files['model']}"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and message in err
    assert err.startswith("train: ") and err.count("\n") == 1 and err.endswith("\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_distributed_without_a_cluster(files, tmp_path):
    config = config_of(files, tmp_path / "out", distributed=True)
    _, err = finished(start(config), 2)
    assert err.startswith("train: distributed: coordinator_address should be defined.")
    assert err.endswith("give --coordinator, --processes and --process-id\n")
    assert err.count("\n") == 1 and not (tmp_path / "out").exists()


def contents(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files}


def test_a_finished_run_is_left_alone(files, run):
    output, _ = run("mofo", **SHOWN)
    before = contents(output)
    with pytest.raises(ValueError, match="holds this run already, and it is finished"):
        train(config_of(files, output, **SHOWN))
    with pytest.raises(ValueError, match=r"holds a run with alpha 0\.1, not 0\.2"):
        train(config_of(files, output, **SHOWN, alpha=0.2))
    assert contents(output) == before


def fails_with(config, capsys):
    """The exit code and the last line on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(flags_of(config))
    return caught.value.code, capsys.readouterr().err.splitlines()[-1]


def test_a_loss_that_is_not_finite(files, tmp_path, capsys):
    output = tmp_path / "out"
    config = config_of(
        files, output, method="adamw", learning_rate=1e30, save_every=1, keep=9
    )
    code, line = fails_with(config, capsys)
    *kept, stopped = metrics_of(output)
    step = stopped["step"]
    assert code == 1 and None in stopped.values()
    assert all(None not in entry.values() for entry in kept)
    pattern = rf"train: (loss|gradient_norm) is \S+ at step {step}; "
    assert re.match(pattern, line)
    # The records of that batch, and the checkpoint before it.
    dataset = load_dataset(files["data"][0], load_tokenizer(files["model"]), 48)
    batches = training_batches([dataset], [1.0], 4, 0)
    for _ in range(step):
        batch = next(batches)
    records = [x for row in batch["row"] for x in dataset.records(int(row))]
    assert len(records) == 4 and f"records are {', '.join(records)}; " in line
    assert line.endswith(f"checkpoint is {output / 'checkpoints' / str(step - 1)}") or (
        step == 1 and line.endswith("there is no checkpoint yet")
    )
    assert not (output / "model").exists()


def test_an_evaluation_that_is_not_finite(files, tmp_path, capsys):
    model = load_model(files["model"])
    model.norm.scale[...] = jnp.full_like(model.norm.scale[...], jnp.nan)
    save_hugging_face(model, tmp_path / "model")
    save_tokenizer(load_tokenizer(files["model"]), tmp_path / "model")
    config = config_of(files | {"model": tmp_path / "model"}, tmp_path / "out")
    code, line = fails_with(config, capsys)
    message = "train: eval_loss is nan at step 0; there is no checkpoint yet"
    assert (code, line) == (1, message)
    (only,) = metrics_of(tmp_path / "out")
    assert only["eval_loss"] is None and only["step"] == 0


# The command line


@pytest.mark.slow
def test_command_on_the_real_model(data_dir, tmp_path):
    """A few steps on real data; docs/results has the numbers of whole runs."""
    for name, size in (("gsm8k_test.jsonl", 40), ("tinystories_excerpt.txt", 60)):
        lines = (data_dir / name).read_text().splitlines(keepends=True)[:size]
        (tmp_path / name).write_text("".join(lines))
    results = {}
    for method in ("mofo", "adamw"):
        config = Config(
            model=data_dir / "stories260K.bin",
            tokenizer=data_dir / "tok512.bin",
            data=(str(data_dir / "gsm8k_train.jsonl"),),
            eval_data=str(tmp_path / "gsm8k_test.jsonl"),
            retain_data=tmp_path / "tinystories_excerpt.txt",
            output=tmp_path / method,
            method=method,
            learning_rate=1e-3,
            steps=8,
            batch_size=4,
            max_length=128,
            samples=1,
        )
        out, err = finished(start(config, tmp_path / "compiled"))
        *_, table, _, _, _, _, _, speed, model, report = out.splitlines()
        assert table.split() == ["before", "after"]
        assert re.fullmatch(r"[\d,]+ tokens/s, MFU \d+\.\d%", speed)
        assert model == f"model: {tmp_path / method / 'model'}"
        assert report == f"report: {tmp_path / method / 'report.html'}"
        assert re.search(r"\d+ records truncated, \d+ dropped, as truncation left", out)
        bar = err.split("\r")
        pattern = (
            r"training: 100%\|.*\| 8/8 \[.*, loss \d+\.\d{3}, [\d,]+ tokens/s, "
            r"\d+\.\d GB, MFU \d+%"
        )
        assert any(re.search(pattern, line) for line in bar), err
        results[method] = json.loads((tmp_path / method / "result.json").read_text())
    for result in results.values():
        assert result["after"]["eval_loss"] < result["before"]["eval_loss"] - 0.5
    mofo, adamw = (results[name]["after"] for name in ("mofo", "adamw"))
    assert mofo["distance"] < 0.6 * adamw["distance"]
    for name in ("retain_loss", "kl", "touched"):
        assert mofo[name] < adamw[name]


def test_bar_in_a_terminal_of_unknown_size(monkeypatch):
    leader, follower = os.openpty()
    with open(follower, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        with tqdm(total=3, **terminal.bar_style()) as bar:
            bar.update(3)
        monkeypatch.undo()
        shown = ""
        while "100%" not in shown:  # it comes in pieces
            shown += os.read(leader, 10_000).decode()
    os.close(leader)
    assert re.search(r"100%\|.*\| 3/3 \[00:00<00:00\]", shown)
