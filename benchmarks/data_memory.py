"""How much memory and time a data set of many records takes.

Generates short records as JSON lines in several files. One fresh process tokenizes them
and writes the rows, another takes the rows and draws random batches, as a training run
does. Peaks are the system's own (VmHWM of /proc, so on Linux), files that are mapped
into memory included. Writes JSON and prints a table.
"""

import dataclasses
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import tyro
from tokenizers import models, pre_tokenizers, trainers
from tqdm import tqdm

from benchmarks.load_memory import memory
from benchmarks.outputs import make_room
from examples import terminal
from examples.checks import check_least
from examples.environment import environment
from examples.files import write_json
from examples.llama.text.batches import training_batches
from examples.llama.text.rows import load_dataset
from examples.llama.text.tokenizer import Tokenizer

LENGTH, BATCH = 64, 64  # tokens a row, rows a batch
ALLOWED = 2e9  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write."""
    records: int = 10_000_000
    """Number of records."""
    files: int = 10
    """Number of files that hold them."""
    batches: int = 20_000
    """Number of batches that are drawn."""
    directory: Path | None = None
    """Where to put the records and rows while it runs; by default a temporary one."""


def sums(seed: int) -> Iterator[str]:
    """Lines of JSON without end, each with a sum to calculate."""
    rng = random.Random(seed)
    while True:
        a, b = rng.randrange(1000), rng.randrange(1000)
        pair = {"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}."}
        yield json.dumps(pair) + "\n"


def generate(directory: Path, args: Args) -> None:
    """Writes the records."""
    directory.mkdir()
    style = terminal.bar_style()
    for i in tqdm(range(args.files), desc="generating", **style):
        count = (args.records + i) // args.files  # together exactly args.records
        with (directory / f"part-{i:03}.jsonl").open("w") as file:
            file.writelines(itertools.islice(sums(i), count))


def make_tokenizer() -> Tokenizer:
    """A tokenizer trained on such records."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(itertools.islice(sums(0), 10_000), trainer)
    return Tokenizer(backend, bos_id=0, eos_ids=(1,), pad_id=0)


def load(data: Path, cache: Path, batches: int) -> dict[str, Any]:
    """Loads the data set and draws batches, in a process that did nothing before."""
    tokenizer = make_tokenizer()
    baseline = memory("VmRSS")
    started = time.perf_counter()
    progress = sys.stderr.isatty()
    dataset = load_dataset(data, tokenizer, LENGTH, cache_dir=cache, progress=progress)
    loading = time.perf_counter() - started
    stream = training_batches([dataset], [1.0], BATCH, seed=0)
    started = time.perf_counter()
    for _ in tqdm(range(batches), desc="batches", **terminal.bar_style()):
        next(stream)
    return {
        "rows": len(dataset),
        "batches": batches,
        "baseline_bytes": baseline,
        "peak_bytes": memory("VmHWM"),
        "loading_seconds": round(loading, 1),
        "seconds_per_batch": (time.perf_counter() - started) / max(1, batches),
    }


def measure(args: Args) -> dict[str, Any]:
    """Both processes one after the other, and the size of what they read and wrote."""
    for name in ("records", "files"):
        check_least(name, getattr(args, name), 1)
    check_least("batches", args.batches, 0)
    results = {"records": args.records, "length": LENGTH, "batch_size": BATCH}
    results |= environment()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        data, cache = Path(directory, "data"), Path(directory, "cache")
        generate(data, args)
        results["data_bytes"] = sum(x.stat().st_size for x in data.iterdir())
        for name, batches in (("first", 0), ("later", args.batches)):
            command = [sys.executable, "-m", "benchmarks.data_memory", "--load"]
            process = subprocess.run(
                [*command, data, cache, str(batches)],
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[name] = json.loads(process.stdout.splitlines()[-1])
        results["rows_bytes"] = sum(x.stat().st_size for x in cache.glob("*.arrow"))
    write_json(args.output, results)
    return results


def report(results: dict[str, Any]) -> str:
    """The processes as a table of Markdown."""
    rows = [
        f"{results['records']:,} records in {results['data_bytes'] / 1e6:,.0f} MB of "
        f"JSON lines; their rows are {results['rows_bytes'] / 1e6:,.0f} MB.",
        "",
        "| process | seconds until the first batch | milliseconds a batch | peak (MB) "
        "| before loading (MB) |",
        "|---|---|---|---|---|",
    ]
    for name, what in (("first", "tokenizes"), ("later", "takes the rows")):
        run = results[name]
        batch = f"{1e3 * run['seconds_per_batch']:.2f}" if run["batches"] else "-"
        rows.append(
            f"| {what} | {run['loading_seconds']:,.1f} | {batch} "
            f"| {run['peak_bytes'] / 1e6:,.0f} | {run['baseline_bytes'] / 1e6:,.0f} |"
        )
    peak = max(results[name]["peak_bytes"] for name in ("first", "later"))
    verdict = "met" if peak < ALLOWED else "NOT met"
    return "\n".join([*rows, "", f"Less than {ALLOWED / 1e9:.0f} GB: {verdict}."])


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the results and prints the table."""
    program = "python -m benchmarks.data_memory"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("data_memory"):
        make_room(args.output)
        print(report(measure(args)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        data, cache, batches = sys.argv[2:]
        print(json.dumps(load(Path(data), Path(cache), int(batches))))
    else:
        main()
