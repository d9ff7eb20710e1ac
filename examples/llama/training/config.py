"""What a training run is told: its settings, and the presets."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from examples.files import read_json_object
from examples.llama.model.parameters import DTypeName

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
    method: Annotated[
        str, tyro.conf.arg(metavar="{adamw,mofo,lion,mofo-lion,gradient,mv,random,hft}")
    ] = "mofo"
    """The optimizer. mofo-lion is the momentum filter over Lion; gradient, mv and
    random select by other scores than mofo, with the same Adam; hft is Adam on half of
    the matrices, drawn by the seed."""
    alpha: float = 0.1
    """The fraction of each parameter that moves in a step, above 0 and up to 1."""
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

    # Against forgetting
    regularize: Annotated[tuple[str, ...], Many, tyro.conf.arg(metavar="KIND:X")] = ()
    """A penalty of strength X, several times too: l1 or l2, the distance from the
    pretrained weights, in the loss; l1-decoupled or l2-decoupled, beside it, as weight
    decay is; ewc, l2 weighted by the Fisher information of --fisher-data; kl, the
    divergence from the pretrained model's predictions of the answers learned."""
    fisher_data: str | None = None
    """Records for ewc, of what is to be kept, in any of the forms of --data; or self,
    texts that the pretrained model writes."""
    fisher_records: int = 128
    """How many of them."""
    replay: Annotated[tuple[str, ...], Many, tyro.conf.arg(metavar="FILE:SHARE")] = ()
    """Records to see again, SHARE rows of them for each row of --data; several times
    too. self:SHARE replays texts that the pretrained model writes by itself."""
    self_replay_rows: int = 256
    """How many texts the pretrained model writes."""
    soft_targets: bool = True
    """Replay those texts by the pretrained model's predictions, not as plain text."""
    gem: Annotated[tuple[str, ...], Many, tyro.conf.arg(metavar="FILE")] = ()
    """Records of an earlier task, whose loss no step may raise (GEM), or self; several
    times too. Each takes a gradient more per step."""
    gem_margin: float = 0.5
    """The least weight of an earlier task's gradient where the step is changed."""
    gem_per_tensor: bool = False
    """Compare gradients tensor by tensor instead of whole."""
    interpolate: Annotated[str | None, tyro.conf.arg(metavar="W[:W]")] = None
    """At the end, go back to this share of the way from the pretrained weights: one
    number (Wise-FT), or that of the first and of the last layer (as in HMA)."""

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


METHODS = ("adamw", "mofo", "lion", "mofo-lion", "gradient", "mv", "random", "hft")
REGULARIZERS = ("l1", "l2", "l1-decoupled", "l2-decoupled", "ewc", "kl")
SELF = "self"  # the name of what the pretrained model writes, among replayed files

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
    for flag in ("--data", "--regularize", "--replay", "--gem"):  # no mixture of both
        if any(x == flag or x.startswith(f"{flag}=") for x in argv):
            options = [x for x in options if not x.startswith(f"{flag}=")]
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
    names = [field.name for field in dataclasses.fields(Config)]
    options = []
    for name, value in read_json_object(path).items():
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


def settings(config: Config) -> dict[str, Any]:
    """All settings as JSON has them, with absolute paths of files."""
    values = dataclasses.asdict(config)
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in values.items()
    }


def same_run(config: Config, path: Path) -> None:
    """Raises ValueError unless the config.json at `path` is of the same run."""
    stored = read_json_object(path)
    # What may differ between the parts of a run, which changes nothing but rounding.
    free = {"preset", "config", "distributed", "coordinator", "processes", "process_id"}
    free |= {"mesh", "save_every", "keep"}
    # Through JSON, in which data's tuple is a list.
    for name, value in json.loads(json.dumps(settings(config))).items():
        if name not in free and stored.get(name) != value:
            raise ValueError(
                f"{config.output}: holds a run with {name} {stored.get(name)!r}, not "
                f"{value!r}; give another output, or the same settings to go on with it"
            )
