"""What an optimizer's step costs on TPUs and GPUs, as their compilers estimate it.

No chip is needed: the compilers also compile for chips that are not there, and say how
many cycles they expect (for a TPU), or which kernels run (on a GPU). How often a search
reads the momentum is counted in a real run of SmolLM2, see
`benchmarks.recorded_passes`. Writes JSON after each program, and a table and a plot
beside it. Started again, it keeps the programs there are. `make accelerators` installs
the compilers and runs all of it.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from tqdm import tqdm

from benchmarks import accelerators_report, recorded_passes
from benchmarks.accelerators_report import LEAF
from benchmarks.outputs import load, make_room, publish
from examples import terminal
from examples.checks import check_least
from examples.chips import ask
from examples.environment import environment
from examples.files import write_json
from examples.llama.checkpoints.smollm2 import smollm2_path
from mofo_jax.testing import Program


class Case(NamedTuple):
    """Parameters, and the chips that they are split over."""

    chip: str
    topology: str  # as JAX names it
    kind: str  # TPU_ACCELERATOR_TYPE
    chips: int  # of that topology
    tree: str  # of `benchmarks.trees.TREES`


TINY, LARGE = "TinyLlama", "Llama-2-7B"
CASES = {
    "tpu": (
        Case("v5e", "v5e:2x2", "v5litepod-4", 1, LEAF),
        Case("v5e", "v5e:2x2", "v5litepod-4", 4, TINY),
        Case("v5e", "v5e:2x4", "v5litepod-8", 8, LARGE),
        Case("v5e", "v5e:8x8", "v5litepod-64", 64, LARGE),
        Case("v5p", "v5p:2x2x1", "v5p-8", 1, LEAF),
        Case("v5p", "v5p:2x2x1", "v5p-8", 1, TINY),
        Case("v5p", "v5p:2x2x2", "v5p-16", 8, LARGE),
        Case("v5p", "v5p:4x4x4", "v5p-128", 64, LARGE),
    ),
    "gpu": (
        Case("H100", "1x1x1", "", 1, LEAF),
        Case("H100", "1x1x1", "", 1, TINY),
        Case("H100", "1x1x8", "", 8, LARGE),
    ),
}
METHODS = ("adamw", *accelerators_report.SCORES)
SEARCHES: dict[str, Program] = {"tpu": "TPUs", "gpu": "one GPU"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    platform: Literal["tpu", "gpu"]
    """Whose compiler to ask."""
    output: Path
    """The JSON file to write; a table and a plot go beside it."""
    python: Path
    """A Python that has this compiler, and mofo_jax."""
    steps: int = 14
    """Steps of the run in which passes are counted."""
    trees: tuple[str, ...] | None = None
    """Parameters to compile for, by name; else all."""


def measure(args: Args) -> dict[str, Any]:
    """Compiles what the file does not have yet.

    Raises:
      ValueError: No steps, the file is of other settings or versions, or SmolLM2 is not
        installed.
    """
    check_least("steps", args.steps, 2)
    settings = {"platform": args.platform, "steps": args.steps}
    begun = {"settings": settings, **environment()}
    results = load(args.output, begun) or begun | {"passes": None, "programs": []}
    if results["passes"] is None:
        search = SEARCHES[args.platform]
        results["passes"] = recorded_passes.measure(smollm2_path(), args.steps, search)
        write_json(args.output, results)
    done = {(*run["case"], run["method"]) for run in results["programs"]}
    todo = [
        (case, method)
        for case, method in itertools.product(CASES[args.platform], METHODS)
        if args.trees is None or case.tree in args.trees
        if (*case, method) not in done
    ]
    bar = tqdm(todo, unit="program", **terminal.bar_style())
    for case, method in bar:
        bar.set_postfix_str(f"{case.chips} x {case.chip}, {case.tree}, {method}")
        program = _compile(args, case, method)
        results["programs"].append({"case": case, "method": method} | program)
        write_json(args.output, results)
    return results


def _compile(args: Args, case: Case, method: str) -> dict[str, Any]:
    """What `benchmarks.ahead` says."""
    command = ["benchmarks.ahead", args.platform, case.topology, str(case.chips)]
    command += [case.tree, method]
    try:
        return ask(args.python, command, args.platform, case.kind)
    except ValueError as error:
        raise ValueError(
            f"{args.python} cannot compile {method} for {case.chips} x {case.chip}: "
            f"{error}"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it and the plot."""
    program = "python -m benchmarks.accelerators"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("accelerators"):
        make_room(args.output)
        results = measure(args)
        publish(
            results, args.output, accelerators_report.table, accelerators_report.plot
        )


if __name__ == "__main__":
    main()
