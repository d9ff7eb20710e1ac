"""What a fine-tuning run will need, on chips that you do not have yet.

python -m examples.llama.plan --model llama3.2-1b --chips v5e-8 h100

Compiles the very training step of examples.llama.train for each machine and method and
says whether it fits, what it holds in memory, what goes between chips, and for TPUs how
long the compiler expects a step to take. Needs the compiler: `pip install jax[tpu]` for
TPUs; for GPUs what `make accelerators` installs. A large model takes minutes.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from examples import terminal
from examples.checks import check_least, check_name, check_writable
from examples.chips import CHIPS, ask
from examples.environment import environment
from examples.files import read_json_object, write_json
from examples.llama.checkpoints.huggingface_config import (
    from_hugging_face,
    to_hugging_face,
)
from examples.llama.model.architectures import ARCHITECTURES, LlamaConfig
from examples.llama.model.llama import REMAT_POLICIES
from examples.llama.training.config import METHODS

# Those that are the trainer's.
FLAGS = (
    *("max_length", "pack", "lora_rank", "dtype", "param_dtype", "remat"),
    "reference",
)


COMPILERS = {
    "tpu": "pip install jax[tpu]",
    "gpu": "make accelerators, for --python build/gpu/bin/python",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """What to plan. Flags that examples.llama.train has mean the same."""

    model: str
    """A Hugging Face directory with a config.json, or the name of a known shape."""
    chips: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="{" + ",".join(CHIPS) + "}")
    ]
    """Machines; v5e-8 are eight chips, v5p-8 four, by the names of Google Cloud."""
    methods: tuple[str, ...] = ("adamw", "mofo", "keep")
    """Methods of examples.llama.train."""
    rows: int = 1
    """Rows of a batch for each chip."""
    max_length: int = 1024
    """Tokens per row."""
    pack: bool = False
    """Several records in a row."""
    lora_rank: int = 0
    """Train a product of this rank beside each projection, not the weights (LoRA)."""
    dtype: str = "bfloat16"
    """Precision of the computation."""
    param_dtype: str = "float32"
    """Precision of the parameters."""
    remat: str = "full"
    """What a layer keeps for the backward pass: none is everything, dots the results of
    products with weights, full its input alone."""
    reference: bool = True
    """Keep the pretrained weights beside the trained ones, to measure forgetting."""
    python: Path = Path(sys.executable)
    """A Python that has the compiler and the examples' packages."""
    output: Path | None = None
    """JSON file to write; the table goes beside it."""


def plan(args: Args) -> dict[str, Any]:
    """Asks `examples.llama.training.ahead`.

    Returns:
      "settings" and "versions", and "plans", what it said for each machine and method.

    Raises:
      ValueError: A setting is out of range or unknown, or the compiler is missing.
      OSError: The model's config.json cannot be read.
    """
    for name in args.chips:
        check_name("chips", name, CHIPS)
    for name in args.methods:
        check_name("methods", name, METHODS)
    check_name("remat", args.remat, REMAT_POLICIES)
    for name, least in {"rows": 1, "max_length": 2, "lora_rank": 0}.items():
        check_least(name, getattr(args, name), least)
    shape = _shape(args.model)
    plans: list[dict[str, Any]] = []
    todo = [(chips, method) for chips in args.chips for method in args.methods]
    bar = tqdm(todo, unit="program", **terminal.bar_style())
    for chips, method in bar:
        bar.set_postfix_str(f"{chips}, {method}")
        found = _ask(args, shape, chips, method)
        plans.append({"chips": chips, "method": method} | found)
    settings = {name: getattr(args, name) for name in ("model", "rows", *FLAGS)}
    versions = environment()["versions"]
    return {"settings": settings, "versions": versions, "plans": plans}


def _shape(model: str) -> LlamaConfig:
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    if not Path(model).is_dir():
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model must be a directory or one of {known}, got {model!r}")
    return from_hugging_face(read_json_object(Path(model) / "config.json"))


def _ask(args: Args, shape: LlamaConfig, chips: str, method: str) -> dict[str, Any]:
    """What `examples.llama.training.ahead` says."""
    machine = CHIPS[chips]
    config = {name: getattr(args, name) for name in FLAGS}
    config |= {"method": method, "batch_size": args.rows * machine.number}
    given = {"chips": chips, "shape": to_hugging_face(shape), "config": config}
    command = ["examples.llama.training.ahead"]
    try:
        return ask(
            args.python, command, machine.platform, machine.kind, json.dumps(given)
        )
    except ValueError as error:
        raise ValueError(
            f"{args.python} cannot compile for {chips}: {error}; the compiler comes "
            f"with {COMPILERS[machine.platform]}"
        ) from error


def table(results: dict[str, Any]) -> str:
    """A row of Markdown for each machine and method."""
    settings = results["settings"]
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    lines = [
        f"# What a fine-tuning step of {settings['model']} needs",
        "",
        f"Nothing ran on a chip: these are the compilers' numbers ({versions}). Each "
        f"chip has {settings['rows']} x {settings['max_length']} tokens, in "
        f"{settings['dtype']}, with parameters in {settings['param_dtype']} and remat "
        f"{settings['remat']}. The time is what a TPU's compiler expects. It counts "
        "attention as if that ran at the chip's peak, and nothing for waiting. Written "
        "by `python -m examples.llama.plan`.",
        "",
        "| chips | method | fits | GB of each chip | parameters | optimizer "
        "| pretrained | step | GB between chips | seconds a step | tokens a second |",
        "|" + "---|" * 11,
    ]
    for run in results["plans"]:
        start = f"| {run['chips']} | {run['method']} |"
        if "memory" not in run:
            lines.append(f"{start} no | {run['does_not_fit']} |" + " |" * 7)
            continue
        memory = run["memory"]
        parts = ("parameters", "optimizer", "pretrained", "step")
        total, chip = sum(memory.values()), CHIPS[run["chips"]].memory
        cells = [
            "yes" if total < chip else "no",
            f"{total / 1e9:.1f} of {chip / 1e9:g}",
        ]
        cells += [f"{memory[part] / 1e9:.2f}" for part in parts]
        cells.append(f"{run['collective_bytes'] / 1e9:.2f}")
        seconds = run["seconds"]
        cells.append("" if seconds is None else f"{seconds:.3f}")
        cells.append("" if seconds is None else f"{run['tokens'] / seconds:,.0f}")
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it as they end examples.llama.train."""
    program = "python -m examples.llama.plan"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("plan"):
        if args.output is not None:
            check_writable(args.output, args.output.parent)
        results = plan(args)
        text = table(results)
        if args.output is not None:
            write_json(args.output, results)
            args.output.with_suffix(".md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
