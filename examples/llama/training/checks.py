"""What is checked of a run's settings before anything is loaded."""

import math
from pathlib import Path

import jax

from examples.checks import check_least, check_seed, check_writable
from examples.llama.checkpoints.fisher_files import read_origin
from examples.llama.evaluation.questions import WORLD
from examples.llama.model.lora import PROJECTIONS
from examples.llama.model.parameters import DTypeName
from examples.llama.text.tokenizer import tokenizer_path
from examples.llama.training.config import METHODS, SELF, Config


def check(config: Config) -> None:
    """Raises ValueError or OSError for what is wrong before anything is loaded."""
    if config.method not in METHODS:
        allowed = ", ".join(METHODS)
        raise ValueError(f"method must be one of {allowed}; got {config.method!r}")
    if not 0 < config.alpha <= 1:
        raise ValueError(f"alpha must be above 0 and up to 1, got {config.alpha}")
    _check_kept(config)
    _check_lora(config)
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
        "fisher_records": 1,
        "self_replay_rows": 1,
        "importance_texts": 1,
    }
    for name, least in least_of.items():
        check_least(name, getattr(config, name), least)
    check_seed(config.seed)
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"accumulate must divide batch_size ({config.batch_size}), got "
            f"{config.accumulate}"
        )
    _check_devices(config)
    for name in ("model", "tokenizer", "retain_data"):
        if (path := getattr(config, name)) is not None:
            path.stat()  # the error names the file
    tokenizer_path(config.tokenizer, config.model)
    if config.knowledge not in (None, WORLD):
        Path(config.knowledge).stat()
    for path in config.record_files:  # raises what is wrong with a name
        path.stat()
    if (source := config.importance_source) not in (None, SELF):
        if not Path(source).is_file():
            raise ValueError(
                f"importance must be {SELF} or a file of examples.llama.fisher; there "
                f"is no file {source!r}"
            )
        read_origin(Path(source))
    check_writable(config.output, config.output)


def check_dtype(dtype: DTypeName) -> None:
    """Raises ValueError for a dtype that these devices do not compute in."""
    if dtype == "float16" and jax.default_backend() == "cpu":
        raise ValueError("dtype must be float32 or bfloat16 on CPUs, got float16")


def _check_devices(config: Config) -> None:
    """Raises ValueError for what these devices cannot do, or would do alone."""
    check_dtype(config.dtype)
    if config.param_dtype == "float16" and not config.lora_rank:
        raise ValueError(
            "param_dtype must be float32 or bfloat16 where the parameters train, got "
            "float16: the squares of small gradients are 0 in it, and updates become "
            "infinite. With lora_rank it may be float16"
        )
    names = ("coordinator", "processes", "process_id")
    given = [name for name in names if getattr(config, name) is not None]
    if given and not config.distributed:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(
            f"{flags} given without --distributed: each process would train alone"
        )


def _check_lora(config: Config) -> None:
    """Raises ValueError for a bad setting of LoRA, or one without LoRA."""
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(
            f"lora_dropout must be 0 or above and below 1, got {config.lora_dropout}"
        )
    given = {
        "lora_dropout": config.lora_dropout > 0,
        "lora_targets": config.lora_modules != PROJECTIONS,
        "lora_merge": config.lora_merge,
    }
    for name, needs_rank in given.items():
        if needs_rank and not config.lora_rank:
            raise ValueError(f"{name} is for LoRA: give lora_rank as well")


def _check_kept(config: Config) -> None:
    """Raises ValueError for a bad setting of what works against forgetting."""
    kinds, interpolation = config.penalties, config.interpolation
    if [source.path for source in config.replayed].count(SELF) > 1:
        raise ValueError(f"replay must name {SELF} at most once, got {config.replay}")
    if ("ewc" in kinds) != (config.fisher_data is not None):
        raise ValueError("regularize ewc and fisher_data need each other, got one")
    if not 0 <= config.gem_margin < math.inf:
        raise ValueError(f"gem_margin must be 0 or above, got {config.gem_margin}")
    if not config.reference and (kinds or config.has_soft_targets or interpolation):
        raise ValueError(
            "regularize, interpolate and soft_targets need the pretrained weights: "
            "leave out --no-reference"
        )
    distances = sorted(kinds.keys() - {"kl"})
    if config.lora_rank and (distances or interpolation):
        raise ValueError(
            f"{distances[0] if distances else 'interpolate'} is not for LoRA, which "
            "leaves the pretrained weights as they are; lower lora_alpha instead"
        )
