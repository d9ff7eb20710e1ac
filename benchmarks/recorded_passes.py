"""How many passes a search takes in a real run, on two simulated devices.

A part of benchmarks.accelerators. Fine-tunes a model for some steps, records the
gradients of some of its layers, and gives these to the optimizers, which search as they
do on the accelerator. Prints a line of JSON: for each score, the mean number of passes
a step, of one matrix and of all layers together, in the second half of the steps.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.turns import step_of
from examples.files import write_json_lines
from examples.general_text import FILE, write_general_text
from examples.llama.training.config import Config
from examples.llama.training.loop import train
from examples.llama.training.optimizers import make_optimizer
from examples.word_problems import word_problems
from mofo_jax import mofo
from mofo_jax.testing import Program, count_passes, search_program

LAYERS = (0, 10, 20, 29)  # of SmolLM2-135M
SCORES = ("momentum", "gain")
BATCH, LENGTH = 4, 160


def record(model: Path, steps: int, directory: Path) -> None:
    """Fine-tunes, and writes the gradients of LAYERS at each step as numpy files."""
    problems = word_problems(BATCH * steps + 8, seed=0)
    data = directory / "train.jsonl"
    write_json_lines(data, [problem._asdict() for problem in problems])
    write_general_text(directory)
    wanted = tuple(f"layers_{i}_" for i in LAYERS)

    def save(name: str, step: np.ndarray, gradient: np.ndarray) -> None:
        np.save(directory / f"{name}.{int(step)}.npy", gradient)

    def recording(config: Config) -> optax.GradientTransformation:
        inner = optax.with_extra_args_support(make_optimizer(config))

        def init(params: Any) -> Any:
            return jnp.int32(0), inner.init(params)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            step, state = state
            for path, leaf in jax.tree.leaves_with_path(updates):
                name = jax.tree_util.keystr(path, simple=True, separator="_")
                if name.startswith(wanted):
                    jax.debug.callback(functools.partial(save, name), step, leaf)
            updates, state = inner.update(updates, state, params, **extra)
            return updates, (step + 1, state)

        return optax.GradientTransformationExtraArgs(init, update)

    config = Config(
        model=model,
        data=(str(data),),
        retain_data=directory / FILE,
        template="tokenizer",
        method="adamw",
        learning_rate=5e-5,
        schedule="constant",
        steps=steps,
        batch_size=BATCH,
        max_length=LENGTH,
        mesh="fsdp=1",
        eval_every=10**6,
        reference=False,
        samples=0,
        report=False,
        output=directory / "run",
    )
    train(config, before={}, optimizer=recording)
    jax.effects_barrier()


def replay(directory: Path, program: Program) -> dict[str, dict[str, float]]:
    """The passes that searches of these gradients take."""
    files = sorted(directory.glob("layers_*.npy"))
    names = sorted({file.name.split(".")[0] for file in files})
    steps = len(files) // len(names)
    largest = max(names, key=lambda name: np.load(directory / f"{name}.0.npy").size)
    mesh = jax.make_mesh((2,), ("fsdp",))
    found: dict[str, dict[str, float]] = {}
    for score in SCORES:
        found[score] = {}
        for what, chosen in (("one matrix", [largest]), ("layers", names)):
            with search_program(program):
                passes = _mean_passes(directory, chosen, steps, mesh, score)
            found[score][what] = passes
    return found


def _mean_passes(
    directory: Path, names: list[str], steps: int, mesh: Any, score: Any
) -> float:
    def put(array: np.ndarray) -> jax.Array:
        spec = P("fsdp") if array.ndim > 1 else P()
        return jax.device_put(array, NamedSharding(mesh, spec))

    def gradients(step: int) -> dict[str, jax.Array]:
        return {n: put(np.load(directory / f"{n}.{step}.npy")) for n in names}

    optimizer = mofo(1e-5, score=score)
    params = jax.tree.map(jnp.zeros_like, gradients(0))
    counts = []
    with count_passes() as passes:
        state = optimizer.init(params)
        step = step_of(optimizer)
        for i in range(steps):
            params, state = step(params, state, gradients(i))
            counts.append(passes())
    return statistics.mean(counts[steps // 2 :])


def measure(model: Path, steps: int, program: Program) -> dict[str, dict[str, float]]:
    """Records in this process, and replays in one with two simulated devices.

    Args:
      model: The model to fine-tune.
      steps: How many.
      program: Of the search, see `mofo_jax.testing.search_program`.
    """
    with tempfile.TemporaryDirectory() as directory:
        record(model, steps, Path(directory))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.recorded_passes", directory, program],
            env=os.environ
            | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
            | {"JAX_PLATFORMS": "cpu"},
            check=True,
            stdout=subprocess.PIPE,
        )
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(directory: str, program: Any) -> None:
    """Replays what is in a directory, and prints what it found."""
    print(json.dumps(replay(Path(directory), program)))


if __name__ == "__main__":
    main(*sys.argv[1:])
