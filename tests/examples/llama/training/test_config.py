"""The command line, presets and configuration files, and what is refused."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from examples.llama.training.checks import check
from examples.llama.training.config import Config
from examples.llama.training.parsing import parse, same_run, settings
from examples.llama.training.presets import PRESETS

REQUIRED = ["--model=m", "--data=d", "--output=o", "--steps=3"]


def parsed(*flags):
    return parse(list(flags), "train", "about")


def test_flags():
    config = parsed(*REQUIRED, "--data", "e:2", "--pack", "--no-reference")
    assert (config.model, config.output) == (Path("m"), Path("o"))
    assert config.data == ("d", "e:2") and config.steps == 3 and config.epochs is None
    assert config.pack and not config.reference
    assert config == Config(
        model=Path("m"), data=("d", "e:2"), output=Path("o"), steps=3, pack=True,
        reference=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = parsed("--preset", name, "--model=m", "--data=d", "--output=o")
    for key, value in PRESETS[name].items():
        assert getattr(config, key) == value
    config = parsed(f"--preset={name}", *REQUIRED[:3], "--alpha=0.3")
    assert config.alpha == 0.3
    # Each is a complete run, but for its files.
    config = dataclasses.replace(config, model=Path("."), data=(__file__,))
    check(dataclasses.replace(config, output=Path("absent")))


def test_the_papers_numbers():
    paper = parsed("--preset=llama2-7b-metamathqa", *REQUIRED[:3])
    assert (paper.alpha, paper.learning_rate, paper.epochs) == (0.15, 2e-5, 2)
    assert (paper.batch_size, paper.max_length, paper.schedule) == (128, 1024, "cosine")
    assert (paper.warmup_steps, paper.weight_decay) == (0, 0)
    assert paper.dtype == "bfloat16" and paper.template == "paper"
    trace = parsed("--preset=tinyllama-trace", *REQUIRED[:3])
    assert (trace.alpha, trace.batch_size) == (0.05, 128)


def test_file(tmp_path):
    """What a run has saved gives the same run; flags win over it, it over a preset."""
    path = tmp_path / "config.json"
    flags = ["--data=e:2", "--data=hf:f", "--replay=self:0.5", "--replay=g:1", "--pack"]
    first = parsed("--preset=tinyllama-trace", *REQUIRED[:3], *flags)
    path.write_text(json.dumps(settings(first)))
    again = parsed("--config", str(path))
    assert again.data == (str(Path("d").resolve()), f"{Path('e').resolve()}:2", "hf:f")
    assert again.replay == ("self:0.5", f"{Path('g').resolve()}:1")
    names = {"preset", "config", "model", "output", "data", "replay"}
    for field in dataclasses.fields(Config):
        if field.name not in names:
            assert getattr(again, field.name) == getattr(first, field.name), field.name
    assert again.model == Path("m").resolve()
    changed = parsed(f"--config={path}", "--alpha=0.5", "--data=f", "--no-pack")
    assert (changed.alpha, changed.data, changed.pack) == (0.5, ("f",), False)
    path.write_text('{"alpha": 0.25}')
    both = parsed("--preset=tinyllama-trace", *REQUIRED[:3], f"--config={path}")
    assert both.alpha == 0.25 and both.batch_size == 128
    path.write_text('{"epochs": null, "steps": 7}')
    steps = parsed("--preset=tinyllama-trace", *REQUIRED[:3], f"--config={path}")
    assert (steps.epochs, steps.steps) == (None, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "list; expected a JSON object"),
        ("{", "expected a JSON object"),
        ('{"colour": 1}', "unknown setting 'colour'; allowed: preset, config, model"),
        ('{"steps": "many"}', "steps: Expected `int | null`, got `str`, 'many'"),
        ('{"data": "file"}', "data: Expected `array`, got `str`, 'file'"),
        ('{"model": 3}', "model: Expected `str`, got `int`, 3"),
        ('{"dtype": "float8"}', "dtype: Invalid enum value 'float8'"),
    ],
)
def test_bad_file(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as caught:
        parsed(*REQUIRED, f"--config={path}")
    assert message in str(caught.value)


def test_bad_names():
    with pytest.raises(ValueError, match=r"preset must be one of .*; got 'x'"):
        parsed(*REQUIRED, "--preset=x")
    with pytest.raises(FileNotFoundError, match="absent"):
        parsed(*REQUIRED, "--config=absent")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--steps", "many"], "--steps"),
        (["--colour", "red"], "--colour"),
        (["--dtype", "float8"], "--dtype"),
        (["--schedule", "square"], "--schedule"),
    ],
)
def test_command_line_errors(flags, named, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(*REQUIRED[:3], *flags)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and named in err


def test_required(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--data=d", "--output=o")
    assert caught.value.code == 2 and "--model" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "about" in out
    flags = set(re.findall(r"--[a-z][a-z-]+", out))
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in flags


BAD = [
    (
        {"method": "adagrad"},
        "method must be one of adamw, sgd, mofo, lion, mofo-lion, gain, gradient, mv, "
        "random, hft, keep; got 'adagrad'",
    ),
    ({"regularize": ("l3:1",)}, "KIND:X, each kind once, among l1, l2, l1-decoupled"),
    ({"regularize": ("l2:1", "l2:2")}, "each kind once"),
    ({"regularize": ("l2",)}, "regularize needs a number, got 'l2'"),
    ({"regularize": ("kl:-1",)}, "regularize must have X above 0, got 'kl:-1'"),
    ({"regularize": ("ewc:1",)}, "regularize ewc and fisher_data need each other"),
    ({"fisher_data": __file__}, "regularize ewc and fisher_data need each other"),
    ({"regularize": ("kl:1",), "reference": False}, "leave out --no-reference"),
    ({"replay": ("self:1",), "reference": False}, "leave out --no-reference"),
    ({"interpolate": "0.5", "reference": False}, "leave out --no-reference"),
    ({"regularize": ("l1:1",), "lora_rank": 2}, "l1 is not for LoRA"),
    ({"interpolate": "0.5", "lora_rank": 2}, "interpolate is not for LoRA"),
    ({"interpolate": "half"}, "interpolate needs a number, got 'half'"),
    ({"interpolate": "0:2"}, "interpolate must be 0 to 1, got '0:2'"),
    ({"replay": ("self:1", "self:2")}, "replay must name self at most once"),
    ({"replay": ("absent:0.1",)}, "'absent'"),
    ({"replay": (__file__,)}, f"replay must be FILE:SHARE, got '{__file__}'"),
    ({"replay": ("self",)}, "replay must be FILE:SHARE, got 'self'"),
    ({"replay": ("hf:a/b::train",)}, "replay must be FILE:SHARE, got 'hf:a/b::train'"),
    ({"gem": ("absent",)}, "'absent'"),
    ({"gem_margin": -1.0}, "gem_margin must be 0 or above, got -1.0"),
    ({"self_replay_rows": 0}, "self_replay_rows must be 1 or above, got 0"),
    ({"importance_texts": 0}, "importance_texts must be 1 or above, got 0"),
    (
        {"importance": "absent"},
        "importance must be self or a file of examples.llama.fisher; there is no file "
        "'absent'",
    ),
    ({"importance": "."}, "there is no file '.'"),
    ({"importance": __file__}, "not safetensors, or damaged"),
    ({"alpha": 0.0}, "alpha must be above 0 and up to 1, got 0.0"),
    ({"alpha": 1.5}, "alpha must be above 0 and up to 1, got 1.5"),
    ({"alpha": math.nan}, "alpha must be above 0 and up to 1, got nan"),
    ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
    ({"learning_rate": math.inf}, "learning_rate must be above 0, got inf"),
    ({"clip_norm": 0.0}, "clip_norm must be above 0, got 0.0"),
    ({"lora_alpha": -1.0}, "lora_alpha must be above 0, got -1.0"),
    ({"weight_decay": -0.1}, "weight_decay must be 0 or above, got -0.1"),
    ({"steps": 0}, "steps must be 1 or above, got 0"),
    ({"steps": None}, "give one of steps and epochs, got None and None"),
    ({"epochs": 1.0}, "give one of steps and epochs, got 3 and 1.0"),
    ({"steps": None, "epochs": 0.0}, "epochs must be above 0, got 0.0"),
    ({"batch_size": 0}, "batch_size must be 1 or above, got 0"),
    ({"accumulate": 0}, "accumulate must be 1 or above, got 0"),
    ({"accumulate": 3}, "accumulate must divide batch_size (16), got 3"),
    ({"max_length": 1}, "max_length must be 2 or above, got 1"),
    ({"eval_every": 0}, "eval_every must be 1 or above, got 0"),
    ({"save_every": 0}, "save_every must be 1 or above, got 0"),
    ({"keep": 0}, "keep must be 1 or above, got 0"),
    ({"seed": -1}, "seed must be 0 to 4294967295, got -1"),
    ({"seed": 1 << 32}, "seed must be 0 to 4294967295, got 4294967296"),
    ({"dtype": "float16"}, "dtype must be float32 or bfloat16 on CPUs, got float16"),
    (
        {"param_dtype": "float16"},
        "param_dtype must be float32 or bfloat16 where the parameters train, got "
        "float16: ",
    ),
    (
        {"coordinator": "a:1", "processes": 2, "process_id": 0},
        "--coordinator, --processes, --process-id given without --distributed",
    ),
    ({"process_id": 0}, "--process-id given without --distributed"),
    ({"warmup_steps": -1}, "warmup_steps must be 0 or above, got -1"),
    ({"lora_rank": -1}, "lora_rank must be 0 or above, got -1"),
    (
        {"lora_dropout": 1.0, "lora_rank": 2},
        "lora_dropout must be 0 or above and",
    ),
    ({"lora_dropout": 0.1}, "lora_dropout is for LoRA: give lora_rank as well"),
    ({"lora_targets": "q_proj"}, "lora_targets is for LoRA: give lora_rank as well"),
    ({"lora_merge": True}, "lora_merge is for LoRA: give lora_rank as well"),
    (
        {"lora_targets": "q_proj,lm_head", "lora_rank": 2},
        "lora_targets must be among all, q_proj, k_proj, v_proj, o_proj, gate_proj, "
        "up_proj, down_proj; got 'lm_head'",
    ),
    ({"samples": -1}, "samples must be 0 or above, got -1"),
    ({"model": Path("absent")}, "'absent'"),
    ({"tokenizer": Path("absent")}, "'absent'"),
    ({"model": Path(__file__)}, "tokenizer must be given, "),
    ({"data": ("absent:2",)}, "'absent'"),
    ({"eval_data": "absent"}, "'absent'"),
    ({"retain_data": Path("absent")}, "'absent'"),
    ({"output": Path(__file__)}, "cannot write to "),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_check(changes, message):
    good = Config(model=Path("."), data=(__file__,), output=Path("absent"), steps=3)
    check(good)
    with pytest.raises((ValueError, OSError)) as caught:
        check(dataclasses.replace(good, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "source", "texts"),
    [
        ({}, None, 0),
        ({"method": "keep"}, "self", 32),
        ({"method": "keep", "importance": "file"}, "file", 0),
        ({"importance": "self", "importance_texts": 5}, "self", 5),
        ({"importance": "self", "gem": ("self",)}, "self", 256),
        ({"importance": "file", "replay": ("self:1",)}, "file", 256),
        ({"fisher_data": "self", "self_replay_rows": 3}, None, 3),
    ],
)
def test_texts_of_the_model(changes, source, texts):
    config = dataclasses.replace(parsed(*REQUIRED), **changes)
    assert config.importance_source == source
    assert config.own_texts == texts and config.needs_own_texts == bool(texts)


def test_same_run(tmp_path):
    config = Config(model=Path("m"), data=("d",), output=tmp_path, steps=3)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings(config)))
    same_run(config, path)
    same_run(dataclasses.replace(config, distributed=True, processes=2), path)
    same_run(dataclasses.replace(config, mesh="fsdp=2", keep=1, save_every=9), path)
    with pytest.raises(
        ValueError, match="holds a run with seed 0, not 1; give another"
    ):
        same_run(dataclasses.replace(config, seed=1), path)
    for text in ("[]", "{", "\0", '"seed"'):
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as caught:
            same_run(config, path)
        assert str(caught.value).endswith("; expected a JSON object")
