"""What a training run is told: its settings, the presets, and what is checked first."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from examples.llama.records import parse_mixture

DTypeName = Literal["float32", "bfloat16", "float16"]
Many = tyro.conf.UseAppendAction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run. A flag wins over --config, that over --preset."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Settings of a known run to start from: llama2-7b-metamathqa, tinyllama-trace or
    llama3.2-1b-gsm8k. Model, data and output still have to be given."""
    config: Path | None = None
    """JSON file of settings, such as the config.json of another run."""

    # Files
    model: Path
    """A Hugging Face directory (config.json, safetensors), or a llama2.c checkpoint."""
    tokenizer: Path | None = None
    """A directory with tokenizer.json, or a llama2.c tokenizer; else the model's."""
    data: Annotated[tuple[str, ...], Many, tyro.conf.arg(metavar="FILE[:WEIGHT]")]
    """Records to learn: JSON lines, or hf:NAME for a data set of the hub. Given several
    times, rows are drawn from each by its weight."""
    eval_data: str | None = None
    """Held-out records, in any of the same forms."""
    retain_data: Path | None = None
    """Plain text such as the model was pretrained on, on which forgetting shows."""
    output: Path
    """Directory for the results. One that holds an unfinished run goes on with it."""

    # Data
    template: Literal["paper", "tokenizer"] = "paper"
    """How a conversation becomes text: as in the paper, or by the tokenizer's own chat
    template."""
    max_length: int = 1024
    """Tokens per row, of which longer records keep the first; and per text window."""
    pack: bool = False
    """Put several records in a row, each seeing itself alone, instead of padding."""
    skip_bad_records: bool = False
    """Count malformed lines and go on, instead of stopping at the first."""

    # Optimizer
    # A plain str, so that `check` names an unknown method in one line.
    method: Annotated[str, tyro.conf.arg(metavar="{adamw,mofo,lion,mofo-lion}")] = (
        "mofo"
    )
    """The optimizer; mofo-lion is the momentum filter over Lion."""
    alpha: float = 0.1
    """MoFO's fraction of each parameter that moves in a step, above 0 and up to 1."""
    learning_rate: float = 2e-5
    """At its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Down to 0 at the last step, or constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to its peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of every entry and with any method."""
    clip_norm: float | None = None
    """The most that the gradient's global norm may be."""
    lora_rank: int = 0
    """Train a product of this rank beside each projection, not the weights (LoRA)."""
    lora_alpha: float = 16.0
    """LoRA's alpha: the product is multiplied by alpha / rank."""

    # Length and size
    steps: int | None = None
    """Training steps; or give epochs."""
    epochs: float | None = None
    """Passes over the rows, instead of steps."""
    batch_size: int = 16
    """Rows per step, over all devices and accumulated parts together."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after another, to save memory."""
    seed: int = 0
    """Of the order of the rows and of LoRA's start."""

    # Precision and devices
    dtype: DTypeName = "float32"
    """Of the computation."""
    param_dtype: DTypeName = "float32"
    """Of the parameters as they are trained."""
    moments_dtype: DTypeName | None = None
    """Of the first moments; by default the parameters'."""
    remat: Literal["none", "dots", "full"] = "none"
    """What to compute again in the backward pass to save memory."""
    mesh: str = "fsdp=-1"
    """Devices by use, as in data=2,fsdp=4,tensor=2; -1 is as many as there are."""
    distributed: bool = False
    """Start jax.distributed; needed on several hosts. TPU pods, SLURM, Open MPI and
    Kubernetes are recognised; elsewhere give the next three as well."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""

    # Along the way
    eval_every: int = 100
    """Steps between evaluations."""
    reference: bool = True
    """Keep the pretrained weights at hand, for the distance from them and the KL. They
    take as much memory as the parameters."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 2
    """How many checkpoints stay."""
    samples: int = 3
    """Answers that the report shows, before and after."""
    export_dtype: DTypeName | None = None
    """Of the exported model; by default the parameters'."""


METHODS = ("adamw", "mofo", "lion", "mofo-lion")

# The paper's runs, as far as it tells their settings.
PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b-metamathqa": {
        "alpha": 0.15,
        "learning_rate": 2e-5,
        "epochs": 2.0,
        "batch_size": 128,
        "max_length": 1024,
        "dtype": "bfloat16",
        "remat": "dots",
    },
    # One task of TRACE; the others have 3, 7, 5, 3, 5, 5 and 7 epochs.
    "tinyllama-trace": {
        "alpha": 0.05,
        "learning_rate": 1e-5,
        "epochs": 5.0,
        "batch_size": 128,
        "max_length": 1024,
        "dtype": "bfloat16",
        "remat": "dots",
    },
    # Not in the paper: its recipe, on the smallest Llama 3.
    "llama3.2-1b-gsm8k": {
        "alpha": 0.15,
        "learning_rate": 2e-5,
        "epochs": 3.0,
        "batch_size": 128,
        "max_length": 512,
        "dtype": "bfloat16",
        "remat": "dots",
    },
}


def parse(argv: Sequence[str] | None, program: str, description: str) -> Config:
    """The configuration of a command line; SystemExit with code 2 where it is bad.

    Raises:
      ValueError: The preset is unknown, or the file of --config is no configuration.
      OSError: That file cannot be read.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    early, _ = tyro.cli(_Early, args=argv, return_unknown_args=True, add_help=False)
    if early.preset is not None and early.preset not in PRESETS:
        allowed = ", ".join(PRESETS)
        raise ValueError(f"preset must be one of {allowed}; got {early.preset!r}")
    preset = {} if early.preset is None else PRESETS[early.preset]
    options = [] if early.config is None else _options(early.config)
    if any(x == "--data" or x.startswith("--data=") for x in argv):
        options = [x for x in options if not x.startswith("--data=")]
    required = dict.fromkeys(("model", "data", "output"), tyro.MISSING)
    return tyro.cli(
        Config,
        prog=program,
        args=options + argv,  # the last one wins
        description=description,
        default=Config(**required | preset),
    )


@dataclasses.dataclass
class _Early:
    preset: str | None = None
    config: Path | None = None


def _options(path: Path) -> list[str]:
    """The settings of a JSON file as flags, which then are checked as such."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected a JSON object") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {type(values).__name__}; expected a JSON object")
    names = [field.name for field in dataclasses.fields(Config)]
    options = []
    for name, value in values.items():
        if name not in names:
            allowed = ", ".join(names)
            raise ValueError(f"{path}: unknown setting {name!r}; allowed: {allowed}")
        flag = name.replace("_", "-")
        if name in ("preset", "config") or value is None:
            continue  # the other settings say what those two did
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            many = value if isinstance(value, list) else [value]
            options += [f"--{flag}={x}" for x in many]
    return options


def check(config: Config) -> None:
    """Raises ValueError or OSError for what is wrong before anything is loaded."""
    if config.method not in METHODS:
        allowed = ", ".join(METHODS)
        raise ValueError(f"method must be one of {allowed}; got {config.method!r}")
    if not 0 < config.alpha <= 1:
        raise ValueError(f"alpha must be above 0 and up to 1, got {config.alpha}")
    above = {
        "learning_rate": config.learning_rate,
        "clip_norm": config.clip_norm,
        "epochs": config.epochs,
        "lora_alpha": config.lora_alpha,
    }
    for name, value in above.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")
    if not 0 <= config.weight_decay < math.inf:
        raise ValueError(f"weight_decay must be 0 or above, got {config.weight_decay}")
    if (config.steps is None) == (config.epochs is None):
        raise ValueError(
            f"give one of steps and epochs, got {config.steps} and {config.epochs}"
        )
    least_of = {
        "steps": 1,
        "batch_size": 1,
        "accumulate": 1,
        "max_length": 2,
        "eval_every": 1,
        "save_every": 1,
        "keep": 1,
        "warmup_steps": 0,
        "lora_rank": 0,
        "samples": 0,
        "seed": 0,
    }
    for name, least in least_of.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or above, got {value}")
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"accumulate must divide batch_size ({config.batch_size}), got "
            f"{config.accumulate}"
        )
    for name in ("model", "tokenizer", "retain_data"):
        if (path := getattr(config, name)) is not None:
            path.stat()  # the error names the file
    if config.tokenizer is None and not config.model.is_dir():
        raise ValueError(f"tokenizer must be given, {config.model} is no directory")
    for text in (*config.data, config.eval_data):
        if text is not None and not text.startswith("hf:"):
            Path(parse_mixture(text)[0]).stat()
    output = config.output.absolute()
    existing = next(p for p in (output, *output.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{config.output}: cannot write to {existing}")


def settings(config: Config) -> dict[str, Any]:
    """All settings as JSON has them, with absolute paths of files."""
    values = dataclasses.asdict(config)
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in values.items()
    }


def same_run(config: Config, path: Path) -> None:
    """Raises ValueError unless the config.json at `path` is of the same run."""
    stored = json.loads(path.read_text())
    # What may differ between the parts of a run; data's tuple is a list in JSON.
    free = {"preset", "config", "distributed", "coordinator", "processes", "process_id"}
    for name, value in json.loads(json.dumps(settings(config))).items():
        if name not in free and stored.get(name) != value:
            raise ValueError(
                f"{config.output}: holds a run with {name} {stored.get(name)!r}, not "
                f"{value!r}; give another output, or the same settings to go on with it"
            )
