"""The loop on one page: what it learns and saves, and that the trainer agrees."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from examples import compilation
from examples.finetune_llama import Settings, finetune, main
from examples.llama.checkpoints.loading import load_model
from examples.llama.generate import main as generate
from examples.llama.model.parameters import named_parameters
from examples.llama.train import train
from tests import processes
from tests.examples.llama.runs import config_of, write_files

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
STEPS = {"learning_rate": 1e-2, "steps": 15, "batch_size": 4, "max_length": 48}

# As a user has it; the trainer sets it itself.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model and its data, as arguments of the trainer's Config."""
    root = tmp_path_factory.mktemp("files")
    with compilation.kept_in(tmp_path_factory.mktemp("compiled")):
        yield write_files(root)


def settings_of(files, output, **changes):
    (data,) = files["data"]
    return Settings(**files | {"data": data, "output": output} | STEPS | changes)


def flags_of(settings):
    """The command line that gives these settings."""
    values = {name: x for name, x in vars(settings).items() if x is not None}
    return [f"--{name.replace('_', '-')}={x}" for name, x in values.items()]


def error_of(argv, capsys, code=2):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    err = capsys.readouterr().err
    # Behind the progress bar, if training had begun.
    *_, line = err.removesuffix("\n").splitlines()
    assert caught.value.code == code and err.endswith("\n")
    assert line.startswith("finetune_llama: ")
    return line.removeprefix("finetune_llama: ")


@pytest.fixture(scope="module")
def tuned(files, tmp_path_factory):
    """The directory of a saved model, and its losses."""
    output = tmp_path_factory.mktemp("tuned") / "model"
    with jax.numpy_dtype_promotion("standard"):
        return output, finetune(settings_of(files, output))


def test_learns_and_saves_what_generates(tuned, files, capsys):
    output, losses = tuned
    assert set(losses) == {"before", "after"}
    before, after = losses["before"], losses["after"]
    assert set(before) == set(after) == {"eval_loss", "retain_loss"}
    assert after["eval_loss"] < before["eval_loss"] - 0.5
    assert after["retain_loss"] != before["retain_loss"]

    start, end = (named_parameters(load_model(x)) for x in (files["model"], output))
    assert start.keys() == end.keys()
    for name, x in start.items():
        moved = float(np.mean(x != end[name]))
        # A matrix moves a tenth in a step, and a part of that again in the next one.
        assert moved == 1 if x.ndim == 1 else 0.1 < moved < 0.9, name
    generate(["--model", str(output), "--prompt=7", "--max-new-tokens=4"])
    assert capsys.readouterr().out.startswith("7")


def test_agrees_with_the_trainer(tuned, files, tmp_path):
    output, losses = tuned
    # Nothing but rounding differs: the trainer divides gradients, not the loss.
    result = train(config_of(files, tmp_path / "run"), progress=False)
    for when, values in losses.items():
        for name, value in values.items():
            np.testing.assert_allclose(value, result[when][name], rtol=1e-5)
    ours, theirs = (
        named_parameters(load_model(x)) for x in (output, tmp_path / "run" / "model")
    )
    for name, x in ours.items():
        np.testing.assert_allclose(x, theirs[name], atol=1e-5, err_msg=name)


def test_replaces_its_own_model_and_depends_on_the_seed(files, tmp_path):
    output = tmp_path / "model"
    runs = [
        finetune(settings_of(files, output, seed=seed, steps=2)) for seed in (0, 1, 0)
    ]
    assert runs[0] == runs[2] != runs[1]
    assert runs[0]["before"] == runs[1]["before"]
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be 1 or above, got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or above, got 0"),
        ({"alpha": 1.5}, "alpha must be in (0, 1], got 1.5"),
        ({"seed": -1}, "seed must be 0 or above, got -1"),
        ({"max_length": 1}, "max_length must be 2 or above, got 1"),
        ({"max_length": 65}, "max_length must be up to the model's 64, got 65"),
        ({"model": "no/model"}, "No such file or directory: 'no/model'"),
        ({"eval_data": "no.jsonl"}, "No such file or directory: 'no.jsonl'"),
        (
            {"retain_data": "empty"},
            "empty, line 1: no text in the file; expected UTF-8",
        ),
        ({"data": "bad.jsonl"}, 'bad.jsonl, line 2: "answer" is missing; expected'),
        ({"tokenizer": "small.json"}, "small.json: "),
    ],
)
def test_bad_input(files, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("")
    Path("small.json").write_text("{}")
    record = {"question": "1", "answer": "a"}
    Path("bad.jsonl").write_text(f'{json.dumps(record)}\n{{"question": "1"}}\n')
    argv = flags_of(settings_of(files, Path("out"), **changes))
    assert message in error_of(argv, capsys)
    assert not Path("out").exists()


def test_keeps_what_is_not_its_own(files, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not overwritten.*: notes\.txt$"):
        finetune(settings_of(files, tmp_path))
    below = tmp_path / "notes.txt" / "new" / "model"
    with pytest.raises(ValueError, match=r"model: cannot write to .*notes\.txt$"):
        finetune(settings_of(files, below))
    assert capsys.readouterr() == ("", "")  # before anything is loaded or trained
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_stops_at_a_loss_that_is_not_finite(files, tmp_path, capsys):
    output = tmp_path / "out"
    argv = flags_of(settings_of(files, output, learning_rate=1e30))
    message = error_of(argv, capsys, code=1)
    assert message == "loss is nan at step 2; nothing is saved"
    assert not output.exists()


@pytest.mark.slow
def test_stories_and_gsm8k(tmp_path):
    """The command itself: a real model learns real records."""
    if not DATA.is_dir():
        pytest.skip("needs ../shared/data beside the repository, which is not there")
    lines = (DATA / "gsm8k_test.jsonl").read_text().splitlines()
    (tmp_path / "eval.jsonl").write_text("\n".join(lines[:64]))
    settings = Settings(
        model=DATA / "stories260K.bin",
        tokenizer=DATA / "tok512.bin",
        data=str(DATA / "gsm8k_train.jsonl"),
        eval_data=str(tmp_path / "eval.jsonl"),
        retain_data=DATA / "tinystories_excerpt.txt",
        output=tmp_path / "model",
        learning_rate=1e-3,
        steps=30,
        batch_size=8,
        max_length=256,
    )
    done = subprocess.run(
        [sys.executable, "-m", "examples.finetune_llama", *flags_of(settings)],
        cwd=ROOT,
        env=processes.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, header, held_out, retained, last = done.stdout.splitlines()
    assert first == (
        "7,050 records (5,640 truncated, 423 dropped); 30 steps, 0.034 epochs"
    )
    assert header.split() == ["before", "after"]
    learnt, forgot = (
        [float(x) for x in line.split()[-2:]] for line in (held_out, retained)
    )
    assert held_out.startswith("held-out loss") and learnt[1] < learnt[0] - 2
    # The pretrained model knows such stories: 1.944 in windows of 256 tokens.
    assert retained.startswith("retained-text loss") and abs(forgot[0] - 1.944) < 0.001
    assert forgot[0] < forgot[1] < forgot[0] + 0.5
    assert last == f"model: {tmp_path / 'model'}"
    assert "30/30" in done.stderr and "loss=" in done.stderr
