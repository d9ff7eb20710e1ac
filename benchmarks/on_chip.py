"""What a step of each optimizer takes on the device that is there, beside AdamW's.

The measured side of benchmarks.accelerators, with its optimizers and parameters on one
device: whole jitted, donated steps in turns in one process. Writes JSON after each tree
of parameters and a table beside it; started again, it keeps what there is.
"""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

from benchmarks.ahead import factors, optimizer_of
from benchmarks.outputs import load, make_room, publish
from benchmarks.trees import TREES, Shapes
from benchmarks.turns import WARMUP, prepare, ratios, take_turns
from examples import terminal
from examples.checks import check_least, check_name
from examples.environment import environment
from examples.files import write_json

METHODS = ("adamw", "mofo", "gain", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write; a table goes beside it."""
    trees: tuple[str, ...] = ("one 4096x4096 leaf", "TinyLlama")
    """Parameters of what, by the names in benchmarks/trees.py. With TinyLlama's, all
    methods together take 75 GB."""
    repeats: int = 15
    """Measured steps of each optimizer."""


def measure(args: Args) -> dict[str, Any]:
    """Times what the file does not have yet.

    Raises:
      ValueError: No repeats, an unknown tree, or the file is of other settings, another
        device or other versions.
    """
    check_least("repeats", args.repeats, 1)
    for name in args.trees:
        check_name("trees", name, TREES)
    begun = {"settings": {"repeats": args.repeats}, **environment()}
    results = load(args.output, begun) or begun | {"trees": {}}
    bar = tqdm(args.trees, unit="tree", **terminal.bar_style())
    for name in bar:
        bar.set_postfix_str(name)
        if name not in results["trees"]:
            results["trees"][name] = _times(TREES[name], args.repeats)
            write_json(args.output, results)
            jax.clear_caches()
    return results


def _times(shapes: Shapes, repeats: int) -> dict[str, Any]:
    optimizers = {method: _with_fisher(method) for method in METHODS}
    runs, inputs = prepare(optimizers, shapes, "ordinary", WARMUP + repeats)

    lowered = [
        step.lower(params, state, params) for step, params, state in runs.values()
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda program: program.compile(), lowered)
        for run, step in zip(runs.values(), compiled, strict=True):
            run[0] = step
    return ratios(take_turns(runs, inputs, WARMUP))


def _with_fisher(method: str) -> optax.GradientTransformation:
    """The optimizer, which takes the Fisher information that it needs from its state.

    What it is makes no difference to the time: one for every entry.
    """
    optimizer = optax.with_extra_args_support(optimizer_of(method))
    if method != "keep":
        return optimizer

    def init(params: Any) -> Any:
        fisher = jax.tree.map(lambda x: jnp.ones(x.shape), factors(params))
        return optimizer.init(params), fisher

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        inner, fisher = state
        updates, inner = optimizer.update(gradients, inner, params, fisher=fisher)
        return updates, (inner, fisher)

    return optax.GradientTransformation(init, update)


def table(results: dict[str, Any]) -> str:
    """Each optimizer on each tree as a row of Markdown."""
    lines = [
        "# What a step costs on a chip, beside AdamW's",
        "",
        f"{results['device']}, jax {results['versions']['jax']}: whole jitted, donated "
        "steps in turns, alpha 10%, float32. Over AdamW: the median of "
        f"{results['settings']['repeats']} turns, and the quartiles. Written by "
        "`python -m benchmarks.on_chip`.",
        "",
        "| parameters | method | step (ms) | over AdamW | quartiles |",
        "|---|---|---|---|---|",
    ]
    for tree, methods in results["trees"].items():
        for method, found in methods.items():
            low, high = np.round(found["quartiles"], 2)
            lines.append(
                f"| {tree} | {method} | {found['ms']:.2f} | {found['ratio']:.2f} | "
                f"{low:.2f} to {high:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it."""
    program = "python -m benchmarks.on_chip"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("on_chip"):
        make_room(args.output)
        publish(measure(args), args.output, table)


if __name__ == "__main__":
    main()
