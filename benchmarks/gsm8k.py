"""What MoFO and AdamW learn of GSM8K, and what a small story-telling Llama forgets.

Trains the 260K-parameter model of TinyStories several times, with the trainer of
examples/llama. Writes every number as JSON, after every run, and a table of them as
Markdown beside it. Started again, it keeps the runs that are there already.
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

from examples import terminal
from examples.files import write_json
from examples.llama.config import Config
from examples.llama.log import environment
from examples.llama.train import train

# Method, alpha, learning rate.
RUNS = (
    ("adamw", None, 1e-3),
    ("mofo", 0.1, 1e-3),
    ("mofo", 0.1, 3e-3),
    ("adamw", None, 3e-4),
    ("mofo", 0.05, 1e-3),
    # Enough of AdamW's learning rates to find one beside each of MoFO's losses.
    ("adamw", None, 5e-4),
    ("adamw", None, 2e-3),
)
MATCHED = 0.05  # nats between held-out losses that count as the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write; the table goes beside it, ending in .md."""
    data: Path = Path("../shared/data")
    """Directory of the model, its tokenizer, GSM8K and the excerpt of TinyStories."""
    steps: int = 400
    """Training steps of each run."""
    batch_size: int = 16
    """Records per step."""
    max_length: int = 256
    """Tokens per record and text window."""
    seed: int = 0
    """Of the order of the records, the same in every run."""


def measure(args: Args) -> dict[str, Any]:
    """Trains every one of RUNS, and writes `args.output` after each.

    Runs that the file holds already, of the same settings, device and versions, are
    not repeated.

    Returns:
      "settings", "device", "versions" and "runs", a list of dictionaries with the
      method, alpha and learning rate, and "before" and "after", the measures that
      `examples.llama.train.train` returns. Not its times, which depend on what else
      the machine does.

    Raises:
      ValueError, OSError: A setting is out of range, or a file is missing or damaged.
      FloatingPointError: A run diverged.
    """
    files = {
        "model": "stories260K.bin",
        "tokenizer": "tok512.bin",
        "data": "gsm8k_train.jsonl",
        "eval_data": "gsm8k_test.jsonl",
        "retain_data": "tinystories_excerpt.txt",
    }
    training = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "seed": args.seed,
    }
    results = {"settings": files | training, **environment(), "runs": []}
    if args.output.exists():
        earlier = json.loads(args.output.read_text())
        if {**earlier, "runs": []} != results:
            raise ValueError(f"{args.output}: holds runs of other settings or versions")
        results = earlier
    runs = results["runs"]
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(RUNS, **terminal.bar_style()) as bar,
    ):
        for method, alpha, learning_rate in bar:
            run = {"method": method, "alpha": alpha, "learning_rate": learning_rate}
            bar.set_description(name(run))
            if any(run.items() <= other.items() for other in runs):
                continue
            paths = {key: args.data / file for key, file in files.items()}
            paths["data"] = (str(paths["data"]),)
            paths["eval_data"] = str(paths["eval_data"])
            config = Config(
                **paths,
                **training,
                **({} if alpha is None else {"alpha": alpha}),
                method=method,
                learning_rate=learning_rate,
                eval_every=args.steps,
                save_every=args.steps,
                keep=1,
                samples=0,
                mesh="fsdp=1",
                output=Path(scratch) / str(len(runs)),
            )
            trained = train(config, progress=False)
            runs.append(run | {key: trained[key] for key in ("before", "after")})
            write_json(args.output, results)
            # Each run compiles functions of its own, which would stay in memory.
            jax.clear_caches()
    return results


def name(run: dict[str, Any]) -> str:
    """How the report calls a run, "MoFO 10%, 1e-3" say."""
    return f"{method_name(run)}, {rate(run)}"


def method_name(run: dict[str, Any]) -> str:
    return "AdamW" if run["method"] == "adamw" else f"MoFO {100 * run['alpha']:g}%"


def rate(run: dict[str, Any]) -> str:
    return np.format_float_scientific(run["learning_rate"], trim="-", exp_digits=1)


def forgotten(run: dict[str, Any]) -> float:
    """By how much the loss on the retained text rose, in nats per token."""
    return run["after"]["retain_loss"] - run["before"]["retain_loss"]


def same_learning_rate(runs: Sequence[dict[str, Any]]) -> str:
    """Whether MoFO forgets less than AdamW at its learning rates, as Markdown."""
    less, parts = [], []
    for adamw in (run for run in runs if run["method"] == "adamw"):
        for run in runs:
            if run["method"] == "mofo" and rate(run) == rate(adamw):
                less.append(forgotten(run) < forgotten(adamw))
                parts.append(
                    f"- {name(run)}: {forgotten(run):+.3f} nats per token of the "
                    f"retained text, with AdamW {forgotten(adamw):+.3f}; held-out loss "
                    f"{run['after']['eval_loss']:.3f}, with AdamW "
                    f"{adamw['after']['eval_loss']:.3f}."
                )
    return "\n".join([f"At the same learning rate, MoFO {_verdict(less)}:", "", *parts])


def same_loss(runs: Sequence[dict[str, Any]]) -> str:
    """Whether MoFO forgets less than an AdamW that learned as much, as Markdown.

    Each run of MoFO is compared with the AdamW run of the nearest held-out loss, if
    that is within MATCHED. There is no interpolation between AdamW's runs: what is
    forgotten is a convex function of the loss, and a chord would flatter MoFO.
    """
    less, parts = [], []
    for run in (run for run in runs if run["method"] == "mofo"):
        loss = run["after"]["eval_loss"]
        gaps = {
            abs(adamw["after"]["eval_loss"] - loss): adamw
            for adamw in runs
            if adamw["method"] == "adamw"
        }
        nearest = gaps[min(gaps)]
        line = (
            f"- {name(run)}: {forgotten(run):+.3f} at a held-out loss of {loss:.3f}; "
        )
        line += f"{name(nearest)}: {forgotten(nearest):+.3f} at "
        line += f"{nearest['after']['eval_loss']:.3f}"
        if min(gaps) <= MATCHED:
            less.append(forgotten(run) < forgotten(nearest))
        else:
            line += ", the nearest, which is too far to compare"
        parts.append(line + ".")
    head = (
        f"At the same held-out loss (within {MATCHED} nats), which AdamW reaches at a "
        f"learning rate of its own, MoFO {_verdict(less)}:"
    )
    return "\n".join([head, "", *parts])


def _verdict(less: list[bool]) -> str:
    if not less:
        return "cannot be compared"
    if all(less):
        return "forgets less in every comparison"
    if not any(less):
        return "forgets less in no comparison"
    return f"forgets less in {sum(less)} of {len(less)} comparisons, not consistently"


def report(results: dict[str, Any]) -> str:
    """The results as Markdown, runs of equal learning rates beside each other."""
    runs, settings = results["runs"], results["settings"]
    order = sorted(
        runs,
        key=lambda run: (run["learning_rate"], run["method"], -(run["alpha"] or 1)),
    )
    rows = [
        "| learning rate | method | held-out loss | retained-text loss | forgotten "
        "| KL | distance |",
        "|---|---|---|---|---|---|---|",
    ]
    before = runs[0]["before"]
    rows.append(
        f"| | pretrained | {before['eval_loss']:.3f} | {before['retain_loss']:.3f} "
        "| | | |"
    )
    for run in order:
        after = run["after"]
        rows.append(
            f"| {rate(run)} | {method_name(run)} | {after['eval_loss']:.3f} "
            f"| {after['retain_loss']:.3f} | {forgotten(run):.3f} "
            f"| {after['kl']:.3f} | {after['distance']:.2f} |"
        )
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    return "\n".join(
        [
            "# GSM8K on a Llama of 260K parameters",
            "",
            f"{settings['steps']} steps of {settings['batch_size']} records, up to "
            f"{settings['max_length']} tokens each, one seed ({settings['seed']}), "
            f"cosine decay; {versions}, on {results['device']}. Written by "
            "`python -m benchmarks.gsm8k`. Held-out loss: nats per answer token over "
            "GSM8K's test records. Retained-text loss: nats per token of TinyStories. "
            "Forgotten: its rise. KL: from the pretrained model on that text, in nats "
            "per token.",
            "",
            *rows,
            "",
            same_learning_rate(runs),
            "",
            same_loss(runs),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it as they end examples.llama.train."""
    program = "python -m benchmarks.gsm8k"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("gsm8k"):
        if args.output.is_dir() or args.output.suffix == ".md":
            raise ValueError(f"output must be a JSON file, got {args.output}")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        results = measure(args)
        table = report(results)
        args.output.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
