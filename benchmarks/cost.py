"""What MoFO costs beside optax.adamw: time, memory, compilation, communication.

Every number is of the whole jitted step with donated arguments, and the ratio of two
steps that ran in turns in one process. Writes JSON after every section, and a table of
it as Markdown and plots beside it. Started again, it keeps the sections there are.
"""

import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from tqdm import tqdm

from benchmarks import cost_report
from benchmarks.cost_others import others
from benchmarks.cost_whole_step import whole_step
from benchmarks.outputs import load, make_room, publish
from benchmarks.trees import TREES, Shapes, llama
from benchmarks.turns import (
    GRADIENTS,
    WARMUP,
    prepare,
    ratios,
    step_of,
    take_turns,
    time_in_turns,
)
from examples import terminal
from examples.checks import check_least, check_name
from examples.environment import environment
from examples.files import write_json
from mofo_jax import mofo
from mofo_jax.testing import count_passes

STEPS = ("one 4096x4096 leaf", "Llama of 23M", "Llama of 134M")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write; a table and plots go beside it."""
    repeats: int = 15
    """Measured steps of each optimizer, at least 15 for numbers to be quoted."""
    tiny: bool = False
    """Small shapes: to see that it runs."""
    sections: tuple[str, ...] | None = None
    """What to measure, by the names in the JSON file; else all."""


def steps(args: Args, tree: str, gradients: str) -> dict[str, Any]:
    """Step time on one tree with one kind of gradients."""
    dtype = jnp.bfloat16 if gradients == "bfloat16 moments" else None
    optimizers = {
        "adamw": optax.adamw(1e-3, mu_dtype=dtype),
        "mofo": mofo(1e-3, mu_dtype=dtype, weight_decay=1e-4),
    }
    return ratios(
        time_in_turns(optimizers, _shapes(args, tree), gradients, args.repeats)
    )


def passes(args: Args) -> dict[str, Any]:
    """How many times a step reads the momentum of one leaf to find its threshold."""
    counts = []
    with count_passes() as taken:
        shapes, total = _shapes(args, "one 4096x4096 leaf"), WARMUP + args.repeats
        runs, inputs = prepare({"mofo": mofo(1e-3)}, shapes, "ordinary", total)
        for given in inputs:
            take_turns(runs, [given], 0)
            counts.append(taken())
    return {"mean": statistics.mean(counts[WARMUP:]), "most": max(counts[WARMUP:])}


def other_ways(args: Args) -> dict[str, Any]:
    """Other ways to the same update, on one leaf."""
    return others({"w": (64, 64) if args.tiny else (2048, 2048)}, args.repeats)


def compilation(args: Args) -> dict[str, Any]:
    """Llama-2-7B's tree, of shapes only: compile time, memory, extra state."""
    shapes = llama(2, 64, 128, 256) if args.tiny else TREES["Llama-2-7B"]
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    result: dict[str, Any] = {"leaves": len(shapes)}
    optimizers = {"adamw": optax.adamw(1e-3), "mofo": mofo(1e-3, weight_decay=1e-4)}
    bytes_of = lambda tree: sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(5):
        for name, optimizer in optimizers.items():
            jax.clear_caches()
            state = jax.eval_shape(optimizer.init, params)
            start = time.perf_counter()
            compiled = step_of(optimizer).lower(params, state, params).compile()
            seconds[name].append(time.perf_counter() - start)
            memory = compiled.memory_analysis()
            result[name] = {
                "temporary_mib": memory.temp_size_in_bytes / 2**20,
                "state_bytes": bytes_of(state),
            }
    for name, values in seconds.items():
        result[name]["seconds"] = statistics.median(values)
    extra = result["mofo"]["state_bytes"] - result["adamw"]["state_bytes"]
    result["extra_bytes_a_block"] = extra / len(shapes)
    result["ratio"] = result["mofo"]["seconds"] / result["adamw"]["seconds"]
    return result


def communication(args: Args) -> dict[str, Any]:
    """What crosses 8 devices: in a process of its own that simulates them."""
    flag = "--xla_force_host_platform_device_count=8"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    simulated = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}  # on any machine
    command = [sys.executable, "-m", "benchmarks.cost_mesh", *["--tiny"] * args.tiny]
    done = subprocess.run(
        command,
        env=os.environ | simulated,
        check=True,
        stdout=subprocess.PIPE,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def growth(args: Args) -> dict[str, Any]:
    """The ratio over the size of a leaf, and over the number of leaves."""
    sizes = [10**3, 10**4] if args.tiny else [10**e for e in range(3, 9)]
    numbers = [1, 10] if args.tiny else [1, 10, 100, 1000]
    optimizers = {"adamw": optax.adamw(1e-3), "mofo": mofo(1e-3)}

    def ratio(shapes: Shapes, repeats: int) -> float:
        times = time_in_turns(optimizers, shapes, "ordinary", repeats)
        value: float = ratios(times)["mofo"]["ratio"]
        return value

    result: dict[str, Any] = {"sizes": [], "leaves": []}
    for size in sizes:
        rows = 10 ** (int(math.log10(size)) // 2)
        shapes: Shapes = {"w": (rows, size // rows)}
        repeats = args.repeats if size < 10**8 else min(args.repeats, 5)
        result["sizes"].append([size, ratio(shapes, repeats)])
    for number in numbers:
        many: Shapes = {f"w{i}": (32, 32) for i in range(number)}
        result["leaves"].append([number, ratio(many, args.repeats)])
    return result


def fine_tuning(args: Args) -> dict[str, Any]:
    """A whole training step of a Llama, batch 8 x 256: loss, gradient and update."""
    return whole_step(args.tiny, args.repeats)


def _shapes(args: Args, tree: str) -> Shapes:
    return {"w": (64, 64), "b": (64,)} if args.tiny else TREES[tree]


def sections() -> dict[str, Callable[[Args], dict[str, Any]]]:
    measured = {
        f"step: {tree}: {gradients}": functools.partial(
            steps, tree=tree, gradients=gradients
        )
        for tree in STEPS
        for gradients in GRADIENTS
    }
    return {
        "compilation": compilation,
        "communication": communication,
        **measured,
        "passes": passes,
        "others": other_ways,
        "growth": growth,
        "fine-tuning": fine_tuning,
    }


def measure(args: Args) -> dict[str, Any]:
    """Runs the sections that the file does not have yet.

    Raises:
      ValueError: No repeats, an unknown section, or the file is of other settings,
        another device or other versions.
    """
    check_least("repeats", args.repeats, 1)
    todo = sections()
    for name in args.sections or ():
        check_name("sections", name, todo)
    settings = {"repeats": args.repeats, "tiny": args.tiny}
    begun = {"settings": settings, **environment()}
    results = load(args.output, begun) or begun
    bar = tqdm(args.sections or todo, unit="section", **terminal.bar_style())
    for name in bar:
        bar.set_postfix_str(name[:40])
        if name not in results:
            results[name] = todo[name](args)
            write_json(args.output, results)
            jax.clear_caches()
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it and the plots."""
    program = "python -m benchmarks.cost"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("cost"):
        make_room(args.output)
        results = measure(args)
        publish(results, args.output, cost_report.table, cost_report.plot)


if __name__ == "__main__":
    main()
