"""Whole runs of the trainer: what they learn, what they leave behind, how they fail."""

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from flax import nnx
from tqdm import tqdm

from examples import terminal
from examples.llama.checkpoint import load_model, save_model
from examples.llama.data import load_gsm8k, load_text, shuffled_batches
from examples.llama.model import Llama, LlamaConfig
from examples.llama.tokenizer import load_llama2c_tokenizer
from examples.llama.train import (
    Config,
    check,
    main,
    make_optimizer,
    train,
)
from tests.examples.llama.llama2c_files import BASE, write_tokenizer

ROOT = Path(__file__).parents[3]
REAL = {
    "model": "stories260K.bin",
    "tokenizer": "tok512.bin",
    "data": "gsm8k_train.jsonl",
    "eval_data": "gsm8k_test.jsonl",
    "retain_data": "tinystories_excerpt.txt",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of one layer, which knows nothing yet, and texts that are easy."""
    root = tmp_path_factory.mktemp("files")
    names = "model", "tokenizer", "data", "eval_data", "retain_data"
    paths = {name: root / name for name in names}
    write_tokenizer(paths["tokenizer"], ["<unk>", *BASE, " "])
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(like):
        return jnp.asarray(rng.normal(scale=0.1, size=like.shape) + (like.ndim == 1))

    state = jax.tree.map(lambda x: draw(x).astype(x.dtype), state)
    save_model(nnx.merge(graph, state), paths["model"])
    for name, count in (("data", 22), ("eval_data", 7)):
        lines = [
            json.dumps({"question": str(n), "answer": "a" * n + "b" * (n % 3) + "!"})
            for n in rng.integers(1, 40, size=count).tolist()
        ]
        paths[name].write_text("\n".join(lines))
    paths["retain_data"].write_text("the cat sat on the mat. " * 12)
    return paths


def config_of(files, output, **changes):
    defaults = {
        "learning_rate": 1e-2,
        "steps": 15,
        "batch_size": 4,
        "max_length": 48,
        "eval_every": 6,
    }
    return Config(**files, output=output, **defaults | changes)


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """Trains into a new directory; returns that and the final numbers, each once."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name, **changes):
        return root / name, train(config_of(files, root / name, **changes))

    return run


def metrics_of(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses_by_hand(model, tokens, mask):
    """Losses of the marked tokens in float64, [count], from the model's logits."""
    # Of one compiled call; the rows are few.
    logits = np.asarray(nnx.jit(lambda m, t: m(t))(model, tokens), np.float64)[:, :-1]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=-1))
    at_targets = np.take_along_axis(shifted, tokens[:, 1:, None], axis=-1)[..., 0]
    return (log_sums - at_targets)[mask[:, 1:]]


def numbers(result):
    return result["before"], result["after"]


def test_learns_and_mofo_moves_less(run):
    _, adamw = run("adamw", method="adamw")
    _, mofo = run("mofo")
    assert adamw["before"] == mofo["before"]
    assert adamw["before"]["distance"] == 0
    for result in (adamw, mofo):
        assert result["after"]["eval_loss"] < result["before"]["eval_loss"] - 0.5
    assert 0 < mofo["after"]["distance"] < 0.8 * adamw["after"]["distance"]
    # All of the entries are AdamW's, whatever compiles the step.
    _, whole = run("whole", alpha=1.0)
    for name, value in whole["after"].items():
        assert value == pytest.approx(adamw["after"][name], rel=1e-3)


def test_numbers_by_hand(files, run):
    output, result = run("mofo")
    tokenizer = load_llama2c_tokenizer(files["tokenizer"])
    held_out = load_gsm8k(files["eval_data"], tokenizer, 48)
    retained = load_text(files["retain_data"], tokenizer, 48)
    assert len(held_out.tokens) == 7 and len(retained.tokens) % 4  # batches of 4
    models = {
        "before": load_model(files["model"]),
        "after": load_model(output / "model"),
    }
    for when, model in models.items():
        for name, dataset in (("eval_loss", held_out), ("retain_loss", retained)):
            expected = losses_by_hand(model, dataset.tokens, dataset.mask).mean()
            assert result[when][name] == pytest.approx(expected, rel=1e-5)
    states = [jax.tree.leaves(nnx.state(model)) for model in models.values()]
    first, last = ([np.asarray(x, np.float64) for x in leaves] for leaves in states)
    squares = [np.sum((a - b) ** 2) for a, b in zip(first, last, strict=True)]
    assert result["after"]["distance"] == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
    tokens, mask = next(
        shuffled_batches(load_gsm8k(files["data"], tokenizer, 48), 4, 0)
    )
    expected = losses_by_hand(models["before"], tokens, mask).mean()
    assert metrics_of(output)[1] == {
        "step": 1,
        "loss": pytest.approx(expected, rel=1e-5),
    }


def test_rerun_is_identical_and_may_be_silent(files, run, tmp_path, capsys):
    output, result = run("mofo")
    capsys.readouterr()
    same = train(config_of(files, tmp_path / "again"), progress=False)
    assert capsys.readouterr() == ("", "")
    assert numbers(result) == numbers(same)
    outputs = output, tmp_path / "again"
    metrics = [(path / "metrics.jsonl").read_bytes() for path in outputs]
    assert metrics[0] == metrics[1]
    states = [nnx.state(load_model(path / "model")) for path in outputs]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_seed(run):
    _, result = run("adamw", method="adamw")
    _, other = run("seed", method="adamw", seed=1)
    assert other["before"] == result["before"]
    assert other["after"]["eval_loss"] != result["after"]["eval_loss"]


def test_saved_parameters_are_the_last_ones(files, run, tmp_path):
    """Training on from them goes on where the run has ended."""
    output, result = run("mofo")
    files = files | {"model": output / "model"}
    config = config_of(files, tmp_path / "on", steps=1, method="adamw")
    on = train(config, progress=False)["before"]
    assert on == result["after"] | {"distance": 0.0}


def test_metrics(run):
    output, result = run("mofo")
    lines = metrics_of(output)
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in trained] == list(range(1, 16))
    assert [line.keys() for line in trained] == [{"step", "loss"}] * 15
    assert [line.pop("step") for line in evaluated] == [0, 6, 12, 15]
    assert (evaluated[0], evaluated[-1]) == numbers(result)
    distances = [line["distance"] for line in evaluated]
    assert distances[0] == 0 and len(set(distances)) == 4


def test_config(files, run):
    output, _ = run("mofo")
    found = json.loads((output / "config.json").read_text())
    expected = dataclasses.asdict(config_of(files, output))
    for name, value in expected.items():
        assert found.pop(name) == (str(value) if isinstance(value, Path) else value)
    tokenizer = load_llama2c_tokenizer(files["tokenizer"])
    for name in ("data", "eval_data"):
        dataset = load_gsm8k(files[name], tokenizer, 48)
        kept, (_, _, truncated, dropped) = len(dataset.tokens), dataset
        records = {"kept": kept, "truncated": truncated, "dropped": dropped}
        assert found["records"][name] == records
    assert found["records"]["data"]["truncated"] > 0
    assert found["versions"]["jax"] == jax.__version__ and found["device"]


def test_plot(run):
    output, _ = run("mofo")
    assert (output / "losses.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = matplotlib.image.imread(output / "losses.png")[..., :3]
    height, width, _ = image.shape
    assert 400 <= height <= 1500 and 1000 <= width <= 3000
    blue, orange = (np.array(rgb) / 255 for rgb in ((0, 114, 178), (213, 94, 0)))
    drawn = [np.abs(image - colour).max(axis=-1) < 0.02 for colour in (blue, orange)]
    halves = [(part[:, : width // 2], part[:, width // 2 :]) for part in drawn]
    assert all(left.sum() > 100 for left, _ in halves)
    assert halves[0][1].sum() == 0 and halves[1][1].sum() > 100


def test_times(run):
    _, result = run("mofo")
    assert result["milliseconds_per_step"] == pytest.approx(
        1000 * result["seconds"] / 15
    )
    tokens = result["tokens_per_second"] * result["seconds"]
    assert 15 * 4 * 20 < tokens <= 15 * 4 * 48


def update_of(config):
    """The jitted update under Optax's dtype rules, and the optimizer's init."""
    optimizer = make_optimizer(config)

    @jax.jit
    def update(gradients, state, params):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradients, state, params)

    return update, optimizer.init


@pytest.mark.parametrize("method", ["adamw", "mofo"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule(files, tmp_path, method, warmup):
    """Gradients that stay the same make Adam's update minus the learning rate."""
    changes = {"method": method, "alpha": 0.25, "warmup_steps": warmup, "steps": 12}
    update, init = update_of(config_of(files, tmp_path, **changes))
    params = {"proj": jnp.ones(8), "norm": jnp.ones(8)}
    gradients = jax.tree.map(lambda x: 1 + jnp.arange(8, dtype=x.dtype), params)
    state = init(params)
    for step in range(13):
        updates, state = update(gradients, state, params)
        along = (step - warmup) / (12 - warmup)
        cosine = 0.5 + 0.5 * math.cos(math.pi * along)
        rate = 1e-2 * (step / warmup if step < warmup else cosine)
        expected = np.full(8, -rate)
        np.testing.assert_allclose(updates["norm"], expected, rtol=1e-4, atol=1e-9)
        if method == "mofo":
            expected[:6] = 0  # a quarter of 8 moves
        np.testing.assert_allclose(updates["proj"], expected, rtol=1e-4, atol=1e-9)
    assert rate == 0


@pytest.mark.parametrize("method", ["adamw", "mofo"])
def test_weight_decay(files, tmp_path, method):
    config = config_of(files, tmp_path, method=method, weight_decay=0.5)
    update, init = update_of(config)
    params = {"proj": jnp.arange(8.0)}
    zeros = optax.tree.zeros_like(params)
    updates, _ = update(zeros, init(params), params)
    np.testing.assert_allclose(updates["proj"], -1e-2 * 0.5 * np.arange(8.0), rtol=1e-6)


# Errors

BAD = [
    ({"method": "sgd"}, "method must be adamw or mofo, got 'sgd'"),
    ({"alpha": 0.0}, "alpha must be above 0 and up to 1, got 0.0"),
    ({"alpha": 1.5}, "alpha must be above 0 and up to 1, got 1.5"),
    ({"alpha": math.nan}, "alpha must be above 0 and up to 1, got nan"),
    ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
    ({"learning_rate": math.inf}, "learning_rate must be above 0, got inf"),
    ({"weight_decay": -0.1}, "weight_decay must be 0 or above, got -0.1"),
    ({"steps": 0}, "steps must be 1 or above, got 0"),
    ({"batch_size": 0}, "batch_size must be 1 or above, got 0"),
    ({"batch_size": 99}, "batch_size must be 1 to 22 examples, got 99"),
    ({"max_length": 1}, "max_length must be 2 or above, got 1"),
    ({"max_length": 65}, "max_length must be up to the model's 64, got 65"),
    ({"eval_every": 0}, "eval_every must be 1 or above, got 0"),
    ({"seed": -1}, "seed must be 0 or above, got -1"),
    ({"warmup_steps": -1}, "warmup_steps must be 0 or above, got -1"),
    ({"warmup_steps": 15}, "warmup_steps must be below 15 steps, got 15"),
    ({"model": "absent"}, "No such file or directory: 'absent'"),
    ({"tokenizer": "absent"}, "No such file or directory: 'absent'"),
    ({"data": "absent"}, "No such file or directory: 'absent'"),
    ({"eval_data": "absent"}, "No such file or directory: 'absent'"),
    ({"retain_data": "absent"}, "No such file or directory: 'absent'"),
    ({"data": "."}, "Is a directory: '.'"),
    ({"model": "."}, ".: not a model of save_model, it has no config.json"),
    ({"data": "note"}, "note, line 1: Expecting value: line 1 column 1 (char 0)"),
    ({"output": "note"}, "note: cannot write to "),
    ({"output": "note/deep"}, "note/deep: cannot write to "),
    ({"output": "/proc/absent"}, "'/proc/absent'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_errors(files, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note").write_text("something else")
    config = dataclasses.asdict(config_of(files, Path("out"))) | changes
    options = [f"--{k.replace('_', '-')}={v}" for k, v in config.items()]
    with pytest.raises(SystemExit) as caught:
        main(options)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and message in err
    assert err.startswith("train: ") and err.count("\n") == 1 and err.endswith("\n")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
    # What is wrong with files is found before the model is loaded, where possible.
    if "No such file" in message or ("must be" in message and "64" not in message):
        assert out == ""


def test_errors_come_before_loading(files, tmp_path):
    broken = {name: tmp_path / name for name in files}
    for path in broken.values():
        path.write_bytes(b"")
    for changes, message in BAD[:2]:
        with pytest.raises(ValueError, match=message):
            check(config_of(broken, tmp_path / "out", **changes))
    check(config_of(broken, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def contents(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files}


def test_nothing_is_overwritten(files, run, tmp_path):
    output, _ = run("mofo")
    before = contents(output)
    with pytest.raises(ValueError, match=re.escape(f"{output}: holds a run already")):
        train(config_of(files, output))
    assert contents(output) == before
    for name in ("config.json", "metrics.jsonl", "losses.png", "model"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"holds a run already, in {name}"):
            check(config_of(files, tmp_path))
        (tmp_path / name).rmdir()
    # What is no run of ours may be there.
    (tmp_path / "notes.txt").write_text("mine")
    check(config_of(files, tmp_path))


def fails_with(options, capsys):
    """The exit code and the last line on stderr."""
    with pytest.raises(SystemExit) as caught:
        main([f"--{k.replace('_', '-')}={v}" for k, v in options.items()])
    return caught.value.code, capsys.readouterr().err.splitlines()[-1]


def test_a_loss_that_is_not_finite(files, tmp_path, capsys):
    output = tmp_path / "out"
    config = config_of(files, output, method="adamw", learning_rate=1e30)
    code, line = fails_with(dataclasses.asdict(config), capsys)
    *kept, stopped = metrics_of(output)
    assert stopped == {"step": len(kept), "loss": None}
    assert code == 1 and re.fullmatch(r"train: loss is \S+ at step \d+", line)
    assert line.endswith(f"at step {len(kept)}")
    assert [entry["step"] for entry in kept] == list(range(len(kept)))
    assert all(math.isfinite(entry["loss"]) for entry in kept[1:])
    assert {path.name for path in output.iterdir()} == {"config.json", "metrics.jsonl"}


def test_an_evaluation_that_is_not_finite(files, tmp_path, capsys):
    model = load_model(files["model"])
    model.norm.scale[...] = jnp.full_like(model.norm.scale[...], jnp.nan)
    save_model(model, tmp_path / "model")
    config = config_of(files | {"model": tmp_path / "model"}, tmp_path / "out")
    assert fails_with(dataclasses.asdict(config), capsys) == (
        1,
        "train: eval_loss is nan at step 0",
    )
    (only,) = metrics_of(tmp_path / "out")
    assert only == {"step": 0, "eval_loss": None, "retain_loss": None, "distance": None}


# The command line


@pytest.fixture(scope="module")
def command(files, tmp_path_factory):
    """Runs the command in a process of its own, on the real model where it is there.

    Returns the options that make a Config, and what the process wrote.
    """
    root, shared = tmp_path_factory.mktemp("command"), ROOT.parent / "shared" / "data"
    options = {"steps": 8, "batch_size": 4, "max_length": 48, "learning_rate": 1e-3}
    if shared.is_dir():
        files = {name: f"../shared/data/{file}" for name, file in REAL.items()}
        options["max_length"] = 128
        for name, size in (("eval_data", 40), ("retain_data", 60)):
            with (ROOT / files[name]).open() as file:
                some = "".join(line for line, _ in zip(file, range(size), strict=False))
            files[name] = root / name
            files[name].write_text(some)
    options |= files
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    command = [sys.executable, "-W", "error", "-m", "examples.llama.train", *flags]
    result = subprocess.run(
        [*command, "--method", "mofo", "--alpha", "0.1", "--output", root / "run"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return options, metrics_of(root / "run"), result.stdout, result.stderr


def test_command(command):
    _, (before, *trained, after), out, err = command
    assert [line["step"] for line in trained] == list(range(1, 9))
    assert after["eval_loss"] < before["eval_loss"]
    table = out.splitlines()[-4:]
    assert table[0].split() == ["before", "after"]
    for line, name in zip(
        table[1:], ("eval_loss", "retain_loss", "distance"), strict=True
    ):
        assert line.endswith(f"{before[name]:9.4f}{after[name]:9.4f}")
    assert re.search(r"records, \d+ of them cut to \d+ tokens; \d+ dropped", out)
    bar = err.split("\r")
    pattern = r"training: 100%\|.*\| 8/8 \[.*, loss \d+\.\d{3}, [\d,]+ tokens/s\]"
    assert any(re.search(pattern, line) for line in bar)
    assert any(re.search(r"training: .* 0/8 \[", line) for line in bar)


def test_real_model_forgets_less_with_mofo(data_dir, command, tmp_path, monkeypatch):
    """A few steps on real data; docs/results has the numbers of whole runs."""
    options, (before, *_, mofo), _, _ = command
    monkeypatch.chdir(ROOT)
    options = {k: Path(v) if k in REAL else v for k, v in options.items()}
    config = Config(**options, method="adamw", output=tmp_path / "adamw")
    adamw = train(config, progress=False)["after"]
    for after in (adamw, mofo):
        assert after["eval_loss"] < before["eval_loss"] - 0.5
    assert mofo["distance"] < 0.6 * adamw["distance"]
    assert mofo["retain_loss"] < adamw["retain_loss"]


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


@pytest.mark.parametrize(
    "options", [["--steps", "many"], ["--colour", "red"], ["--model"], []]
)
def test_command_line_errors(files, options, capsys):
    given = [f"--{k.replace('_', '-')}={v}" for k, v in files.items()]
    with pytest.raises(SystemExit) as caught:
        main([*given, *(["--output=out", *options] if options else [])])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert (options[0] if options else "--output") in err


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    flags = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    names = {field.name.replace("_", "-") for field in dataclasses.fields(Config)}
    assert flags == {"--help", *(f"--{name}" for name in names)}
