"""A small model, easy texts, and runs of the trainer on them, for several tests."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama
from examples.llama.text.tokenizer import load_tokenizer, save_tokenizer
from examples.llama.training.config import Config
from tests import processes
from tests.examples.llama.checkpoints.llama2c_files import BASE, write_tokenizer

ROOT = Path(__file__).parents[3]
CONFIG = LlamaConfig(
    vocab_size=260,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
SETTINGS = {
    "learning_rate": 1e-2,
    "steps": 15,
    "batch_size": 4,
    "max_length": 48,
    "eval_every": 6,
    "save_every": 100,
    "samples": 0,
    "report": False,
    "mesh": "fsdp=1",
}


def random_model(config, rng):
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))

    def draw(like):
        return jnp.asarray(rng.normal(scale=0.1, size=like.shape) + (like.ndim == 1))

    state = jax.tree.map(lambda x: draw(x).astype(x.dtype), state)
    return nnx.merge(graph, state)


def write_files(root):
    """A model directory with a tokenizer, records and text: arguments of Config."""
    write_tokenizer(root / "tokenizer.bin", ["<unk>", *BASE, " "])
    rng = np.random.default_rng(0)
    save_hugging_face(random_model(CONFIG, rng), root / "model")
    save_tokenizer(load_tokenizer(root / "tokenizer.bin"), root / "model")
    for name, count in (("data.jsonl", 22), ("eval.jsonl", 7)):
        lines = [
            json.dumps({"question": str(n), "answer": "a" * n + "b" * (n % 3) + "!"})
            for n in rng.integers(1, 40, size=count).tolist()
        ]
        (root / name).write_text("\n".join(lines))
    (root / "retain.txt").write_text("the cat sat on the mat. " * 12)
    return {
        "model": root / "model",
        "data": (str(root / "data.jsonl"),),
        "eval_data": str(root / "eval.jsonl"),
        "retain_data": root / "retain.txt",
    }


def files_below(root):
    """The files under a directory, and when each was written."""
    return {
        (path.relative_to(root), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


def config_of(files, path, /, **changes):
    return Config(**files | {"output": path} | SETTINGS | changes)


def flags_of(config):
    """The command line that gives this configuration."""
    flags = []
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if value is None or value == field.default:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            many = value if isinstance(value, tuple) else (value,)
            flags += [f"--{flag}={x}" for x in many]
    return flags


def metrics_of(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def start(config, cache=None, **options):
    """Starts the command in a process of its own, on one CPU device."""
    environment = processes.environment()
    if cache is not None:  # so that many processes compile once
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    return subprocess.Popen(
        [sys.executable, "-m", "examples.llama.train", *flags_of(config)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def lines_of(output):
    """How many lines of metrics a run has written so far."""
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(what, *processes, seconds=120):
    """Waits until what() is true, while all processes run."""
    end = time.monotonic() + seconds
    while not what():
        ended = [p.communicate() for p in processes if p.poll() is not None]
        assert time.monotonic() < end and not ended, ended
        time.sleep(0.001)


def finished(process, code=0, timeout=200):
    """Waits; returns what the process wrote to stdout and stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


def tensors_of(model_directory):
    """Every tensor of an exported model, as bytes."""
    from safetensors import safe_open

    found = {}
    for path in sorted(model_directory.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            found |= {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    return found
