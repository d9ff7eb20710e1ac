"""Which method keeps most of a pretrained model at the same fine-tuning quality.

python -m benchmarks.forgetting --data-dir DIR --output docs/results/forgetting.json

Fine-tunes a model by every method, along each method's learning rates (or what else its
curve goes along), with several seeds. Writes every number as JSON after every run, and
beside it a table and a plot of the frontier: what is forgotten over what is learned.
Started again, it goes on after the last complete run. Any model and data will do; DIR
holds those of llama2.c's stories260K and GSM8K.
"""

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from tqdm import tqdm

from benchmarks.forgetting_methods import METHODS
from benchmarks.forgetting_report import plot, report
from examples import compilation, terminal
from examples.files import write_json
from examples.llama.config import Config
from examples.llama.log import environment
from examples.llama.train import train

# Of stories260k, in --data-dir.
FILES = {
    "model": "stories260K.bin",
    "tokenizer": "tok512.bin",
    "data": "gsm8k_train.jsonl",
    "eval_data": "gsm8k_test.jsonl",
    "retain_data": "tinystories_excerpt.txt",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write; table and plot go beside it, ending in .md and .png."""
    data_dir: Path | None = None
    """Directory of stories260K.bin, tok512.bin, gsm8k_train.jsonl, gsm8k_test.jsonl and
    tinystories_excerpt.txt; instead of it give the next five."""
    model: Path | None = None
    """As of examples.llama.train, and so are the next four."""
    tokenizer: Path | None = None
    data: Path | None = None
    eval_data: Path | None = None
    retain_data: Path | None = None
    methods: tuple[str, ...] = tuple(METHODS)
    """Names among those of benchmarks/forgetting_methods.py."""
    rate_scale: float = 1.0
    """Multiplies all learning rates; those of the list suit the 260K model."""
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


def measure(args: Args) -> dict[str, Any]:
    """Trains what `args.output` does not hold yet, and writes that after every run.

    Returns:
      "settings"; "pretrained", the measures before; and "runs", a list with the method,
      the changes of its point, the seed, the measures "after", the "seconds" of
      training, and the device and versions.

    Raises:
      ValueError, OSError: A setting is out of range, or a file is missing or damaged.
      FloatingPointError: A run diverged.
    """
    for name in args.methods:
        if name not in METHODS:
            allowed = ", ".join(METHODS)
            raise ValueError(f"methods must be among {allowed}; got {name!r}")
    paths = files(args)
    names = ("rate_scale", "steps", "batch_size", "max_length", "eval_records")
    settings = {key: path.name for key, path in paths.items()}
    settings |= {name: getattr(args, name) for name in names}
    results: dict[str, Any] = {"settings": settings, "pretrained": {}, "runs": []}
    if args.output.exists():
        results = json.loads(args.output.read_text())
        if results["settings"] != settings:
            raise ValueError(f"{args.output}: holds runs of other settings")
    # All methods' first points and seeds first, so that an early end has all of them.
    wanted = []
    for seed in range(args.seeds):
        for changes in itertools.zip_longest(
            *(METHODS[m].points for m in args.methods)
        ):
            for method, point in zip(args.methods, changes, strict=True):
                if point is not None:
                    wanted.append({"method": method, "point": point, "seed": seed})
    keys = ("method", "point", "seed")
    done = [{key: run[key] for key in keys} for run in results["runs"]]
    missing = [run for run in wanted if run not in done]
    with (
        tempfile.TemporaryDirectory() as scratch,
        # Much is the same in all runs, and compiled once.
        compilation.kept_in(f"{scratch}/compiled"),
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
        for number, run in enumerate(missing):
            bar.set_description(f"{run['method']} {_point(run)} seed {run['seed']}")
            config = configuration(args, paths, run, Path(scratch) / str(number))
            start = time.perf_counter()
            found = train(config, progress=False)
            results["pretrained"] = found["before"]
            run |= {"after": found["after"], "seconds": found["seconds"]}
            results["runs"].append(run | environment())
            write_json(args.output, results)
            bar.set_postfix_str(
                f"loss {found['after']['eval_loss']:.3f}, retained "
                f"{found['after']['retain_loss']:.3f}, "
                f"{time.perf_counter() - start:.0f} s",
                refresh=False,
            )
            bar.update()
            # Each run compiles functions of its own, which would stay in memory.
            jax.clear_caches()
    return results


def files(args: Args) -> dict[str, Path]:
    """The paths of model and data.

    Raises:
      ValueError: One is not given.
    """
    found = {}
    for key, name in FILES.items():
        path = getattr(args, key)
        if path is None and args.data_dir is not None:
            path = args.data_dir / name
        if path is None and key == "tokenizer":
            continue  # the model's own
        if path is None:
            raise ValueError(f"give data_dir or {key}")
        found[key] = path
    return found


def configuration(
    args: Args, paths: dict[str, Path], run: dict[str, Any], output: Path
) -> Config:
    """Of one run. Its settings are those of the method, the point and the seed."""
    changes: dict[str, Any] = {"learning_rate": 1.0}
    changes |= METHODS[run["method"]].common | run["point"]
    changes["learning_rate"] *= args.rate_scale
    common = {
        **{key: paths.get(key) for key in ("model", "tokenizer", "retain_data")},
        "data": (str(paths["data"]),),
        "eval_data": str(paths["eval_data"]),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "eval_every": args.steps,
        "save_every": args.steps,
        "keep": 1,
        "samples": 0,
        "mesh": "fsdp=1",
        "seed": run["seed"],
        "output": output,
    }
    return Config(**common | changes)


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
        text = report(results)
        args.output.with_suffix(".md").write_text(text)
        plot(results, args.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
