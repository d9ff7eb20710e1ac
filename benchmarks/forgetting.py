"""Which method keeps most of a pretrained model at the same fine-tuning quality.

python -m benchmarks.forgetting --suite stories260k --data-dir DIR --output FILE.json

Fine-tunes a model by every method, along each method's learning rates (or what else its
curve goes along), with several seeds. Writes every number as JSON after every run, and
beside it a table and a plot of the frontier: what is forgotten over what is learned.
Started again, it goes on after the last complete run. Any model and data will do. The
suite stories260k is of llama2.c's model and takes two to three hours on two cores; gpu
is of the model that benchmarks.pretrain makes. DIR has the model and GSM8K.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import tyro
from tqdm import tqdm

from benchmarks.forgetting_methods import METHODS, SUITES
from benchmarks.forgetting_report import plot, report
from benchmarks.workers import each
from examples import compilation, terminal
from examples.files import write_json
from examples.llama.config import Config
from examples.llama.log import environment
from examples.llama.train import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write; table and plot go beside it, ending in .md and .png."""
    # A plain str, so that an unknown one is named in one line.
    suite: Annotated[str, tyro.conf.arg(metavar="{stories260k,gpu}")] = "stories260k"
    """Which model, data, methods and learning rates, as far as the next ones do not say
    otherwise."""
    data_dir: tuple[Path, ...] = ()
    """Directories that have the suite's files."""
    model: Path | None = None
    """As of examples.llama.train, and so are the next four."""
    tokenizer: Path | None = None
    data: Path | None = None
    eval_data: Path | None = None
    retain_data: Path | None = None
    methods: tuple[str, ...] | None = None
    """Names among those of benchmarks/forgetting_methods.py."""
    rate_scale: float | None = None
    """Multiplies the learning rates there, which suit the 260K model."""
    seeds: int = 3
    """Runs of each setting."""
    steps: int = 200
    """Training steps of each run."""
    batch_size: int = 8
    """Records per step."""
    max_length: int = 256
    """Tokens per record and text window."""
    eval_records: int = 400
    """Held-out records, the first ones of --eval-data."""
    workers: int = 1
    """Runs at a time, each in a process with its share of the cores. One core trains a
    small model at more than half the speed of two. Leave it at 1 on an accelerator."""
    minutes: float = math.inf
    """After these, no further run begins; the same command goes on."""


def measure(args: Args) -> dict[str, Any]:
    """Trains what `args.output` does not hold yet, and writes that after every run.

    Returns:
      "settings"; "pretrained", the measures before; "runs", a list with the method,
      the changes of its point, the seed, the measures "after", the "seconds" of
      training, and the device and versions; and how many runs are "wanted".

    Raises:
      ValueError, OSError: A setting is out of range, or a file is missing or damaged.
      FloatingPointError: A run diverged.
    """
    begun = time.monotonic()
    if args.suite not in SUITES:
        raise ValueError(f"suite must be among {_list(SUITES)}; got {args.suite!r}")
    suite = SUITES[args.suite]
    methods = args.methods or suite.methods
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"methods must be among {_list(METHODS)}; got {name!r}")
    paths = files(args)
    settings = {key: path.name for key, path in paths.items()}
    scale = suite.rate_scale if args.rate_scale is None else args.rate_scale
    settings["rate_scale"] = scale
    names = ("steps", "batch_size", "max_length", "eval_records")
    settings |= {name: getattr(args, name) for name in names} | suite.settings
    results: dict[str, Any] = {"settings": settings, "pretrained": {}, "runs": []}
    if args.output.exists():
        results = json.loads(args.output.read_text())
        if results["settings"] != settings:
            raise ValueError(f"{args.output}: holds runs of other settings")
    wanted = _runs(methods, args.seeds)
    keys = ("method", "point", "seed")
    done = [{key: run[key] for key in keys} for run in results["runs"]]
    missing = [run for run in wanted if run not in done]
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(
            total=len(wanted),
            initial=len(wanted) - len(missing),
            **terminal.bar_style(),
        ) as bar,
    ):
        held_out = Path(scratch) / "held_out.jsonl"
        lines = paths["eval_data"].read_text().splitlines()[: args.eval_records]
        held_out.write_text("\n".join(lines))
        paths["eval_data"] = held_out
        jobs = []
        for number, run in enumerate(missing):
            output = Path(scratch) / str(number)
            config = configuration(args.suite, settings, paths, run, output)
            jobs.append(Job(run, config))
        for run in each(_train, jobs, args.workers, begun + 60 * args.minutes):
            results["pretrained"] = run.pop("before")
            results["runs"].append(run | {"workers": args.workers})
            write_json(args.output, results)
            bar.set_description(f"{run['method']} {_point(run)} seed {run['seed']}")
            bar.set_postfix_str(
                f"loss {run['after']['eval_loss']:.3f}, retained "
                f"{run['after']['retain_loss']:.3f}",
                refresh=False,
            )
            bar.update()
    return results | {"wanted": len(wanted)}


def _runs(methods: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """All runs, seed by seed: an early end has every method with fewer seeds."""
    points = list(itertools.zip_longest(*(METHODS[name].points for name in methods)))
    return [
        {"method": method, "point": point, "seed": seed}
        for seed in range(seeds)
        for changes in points
        for method, point in zip(methods, changes, strict=True)
        if point is not None
    ]


class Job(NamedTuple):
    """A run to do."""

    run: dict[str, Any]  # its "method", "point" and "seed"
    config: Config


def _train(job: Job) -> dict[str, Any]:
    # Much is the same in all runs, and compiled once by each process.
    with compilation.kept_in(job.config.output.parent / f"compiled{os.getpid()}"):
        found = train(job.config, progress=False)
    # Each run compiles functions of its own, which would stay in memory, and leaves a
    # model and a checkpoint.
    jax.clear_caches()
    shutil.rmtree(job.config.output)
    kept = {name: found[name] for name in ("before", "after", "seconds")}
    return job.run | kept | environment()


def files(args: Args) -> dict[str, Path]:
    """The paths of model and data.

    Raises:
      ValueError: One is neither given nor in a directory.
    """
    found = {}
    names = SUITES[args.suite].files
    for key in ("model", "tokenizer", "data", "eval_data", "retain_data"):
        path = getattr(args, key)
        if path is None and key in names:
            places = (directory / names[key] for directory in args.data_dir)
            path = next((place for place in places if place.exists()), None)
        if path is not None:
            found[key] = path
        elif key != "tokenizer":  # which may be the model's own
            flag = key.replace("_", "-")
            raise ValueError(
                f"--{flag}: not given, and no {names[key]} in --data-dir"
                f"{''.join(f' {directory}' for directory in args.data_dir)}"
            )
    return found


def configuration(
    suite: str,
    settings: dict[str, Any],
    paths: dict[str, Path],
    run: dict[str, Any],
    output: Path,
) -> Config:
    """Of one run. Its settings are those of the method, the point and the seed."""
    method: dict[str, Any] = {"learning_rate": 1.0}
    method |= METHODS[run["method"]].common | run["point"]
    method["learning_rate"] *= settings["rate_scale"]
    of_suite = SUITES[suite].settings
    common = {
        **{key: paths.get(key) for key in ("model", "tokenizer", "retain_data")},
        "data": (str(paths["data"]),),
        "eval_data": str(paths["eval_data"]),
        "steps": settings["steps"],
        "batch_size": settings["batch_size"],
        "max_length": settings["max_length"],
        "eval_every": settings["steps"],
        "save_every": settings["steps"],
        "keep": 1,
        "samples": 0,
        "mesh": "fsdp=1",
        "seed": run["seed"],
        "output": output,
    }
    return Config(**common | of_suite | method)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _point(run: dict[str, Any]) -> str:
    return " ".join(f"{value}" for value in run["point"].values())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it as they end examples.llama.train."""
    program = "python -m benchmarks.forgetting"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("forgetting"):
        if args.output.suffix != ".json":
            raise ValueError(f"output must end in .json, got {args.output}")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        results = measure(args)
        done, wanted = len(results["runs"]), results.pop("wanted")
        if done < wanted:
            print(f"{done} of {wanted} runs; the same command goes on")
        if not done:
            return
        text = report(results)
        args.output.with_suffix(".md").write_text(text)
        plot(results, args.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
