"""LoRA as a directory of PEFT's: adapter_config.json and adapter_model.safetensors.

PEFT's A is [rank, in] and its B [out, rank]; here both are transposed. Nothing is
unpickled.
"""

import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from examples.files import read_json_object, write_json
from examples.llama.checkpoints.directories import (
    SUMS,
    TOKENIZER,
    gathered,
    save_directory,
)
from examples.llama.checkpoints.safetensors_files import (
    DTYPES,
    Tensor,
    read_header,
    read_tensor,
    write_file,
)
from examples.llama.model.llama import Llama
from examples.llama.model.lora import LoRALinear, lora_layers, place, projections
from examples.llama.model.parameters import Sharding

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# What a saved adapter's directory holds, the tokenizer's files included.
OURS = re.compile(
    rf"adapter_config\.json|adapter_model\.safetensors|{TOKENIZER}|{SUMS}"
)
# How A and B started. The other ways that PEFT knows change the base's weights.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings that are read below, that tensors tell, or that do not matter once trained.
# What another one does is not done here, so that it has to be off.
KNOWN = (
    *("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "base_model_name_or_path", "revision", "peft_version"),
    *("auto_mapping", "inference_mode", "runtime_config", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying"),
)


def save_adapter(
    model: Llama, directory: str | os.PathLike[str], *, base: str | os.PathLike[str]
) -> None:
    """Writes the LoRA of a model, in float32, as a directory that PEFT loads.

    Like `save_hugging_face`, it writes all or nothing, and all processes must call it.

    Args:
      model: A model with LoRA of `add_lora`.
      directory: Where to. An adapter that was saved here before is replaced whole, also
        the tokenizer beside it.
      base: The name or path of the model without LoRA, which PEFT loads it from.

    Raises:
      ValueError: The model's layers do not have LoRA all alike, or `directory` holds
        something other than an adapter saved here.
      OSError: The directory cannot be written.
    """
    linears = lora_layers(model)
    targets = sorted({path.rpartition(".")[2] for path in linears})
    kinds = {(x.rank, x.alpha, x.dropout.rate) for x in linears.values()}
    if len(kinds) != 1 or len(linears) != len(targets) * len(model.layers):
        raise ValueError("model: its layers must have LoRA all alike")
    ((rank, alpha, dropout),) = kinds
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.fspath(base),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
    }
    names = [name for path in linears for name in _tensor_names(path)]
    arrays = [y[...] for x in linears.values() for y in (x.lora_a, x.lora_b)]
    shapes = {name: x.shape[::-1] for name, x in zip(names, arrays, strict=True)}
    dtype = np.dtype(np.float32)
    tensors = (array.T for array in gathered(arrays, dtype))

    def write(staging: Path) -> None:
        write_json(staging / CONFIG, config)
        write_file(staging / WEIGHTS, shapes, dtype, tensors)

    path = Path(directory).resolve()
    save_directory(path, tensors, write, ours=OURS, what="an adapter")


def load_adapter(
    model: Llama,
    directory: str | os.PathLike[str],
    *,
    sharding: Sharding | None = None,
) -> None:
    """Puts the LoRA of a PEFT adapter around a model's projections, in place.

    Every tensor is checked before the first is read. `merge_lora` then makes a plain
    model of it.

    Args:
      model: The adapter's base model, without LoRA.
      directory: An adapter of `save_adapter` or of PEFT.
      sharding: A function of a parameter's name and shape that returns where it goes;
        None is JAX's default device.

    Raises:
      ValueError: A file is absent, damaged or a pickle, the adapter does more than
        LoRA of the seven projections, or its tensors do not fit the model.
      OSError: A file cannot be read.
    """
    directory = Path(directory)
    settings = _read_settings(directory)
    if not (file := directory / WEIGHTS).is_file():
        pickle = (directory / PICKLE).is_file()
        hint = f": {PICKLE} is a pickle, which is never opened" if pickle else ""
        raise ValueError(f"{directory}: expected {WEIGHTS}{hint}")
    rank, alpha = settings["r"], float(settings["lora_alpha"])
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)  # divided by the rank, it gives alpha / sqrt(rank)
    paths = _check_tensors(file, read_header(file), model, settings)
    for path, block, name in projections(model):
        if path not in paths:
            continue
        whole = (slice(None), slice(None))
        a, b = (read_tensor(file, name, whole).T for name in _tensor_names(path))
        linear = LoRALinear(getattr(block, name), a, b, alpha)
        setattr(block, name, linear)
        if sharding is not None:
            place(path, linear, sharding)


def _tensor_names(path: str) -> list[str]:
    """PEFT's names of A and B of the projection "layers.0.mlp.up_proj", say."""
    return [f"base_model.model.model.{path}.lora_{x}.weight" for x in "AB"]


def _read_settings(directory: Path) -> dict[str, Any]:
    """What adapter_config.json says; ValueError for what is not done here."""
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory}: not a PEFT adapter, no {CONFIG}")
    settings = read_json_object(path)
    for key, allowed in {
        "peft_type": ("LORA",),
        "task_type": ("CAUSAL_LM", None),
        "init_lora_weights": STARTS,
        "use_rslora": (True, False, None),
    }.items():
        if (value := settings.get(key)) not in allowed:
            names = ", ".join(map(repr, allowed))
            raise ValueError(f"{path}: {key} must be among {names}; got {value!r}")
    for key, value in settings.items():
        if key not in KNOWN and value and value != "none":
            raise ValueError(f"{path}: {key} must be off, got {value!r}")
    for key, kinds in {"r": (int,), "lora_alpha": (int, float)}.items():
        number: Any = settings.get(key)
        if type(number) not in kinds or not 0 < number <= sys.float_info.max:
            kind = "an integer" if key == "r" else "a number"
            raise ValueError(f"{path}: {key} must be {kind} above 0, got {number!r}")
    return settings


def _check_tensors(
    file: Path, tensors: dict[str, Tensor], model: Llama, settings: Mapping[str, Any]
) -> set[str]:
    """The paths of the projections that have LoRA.

    Raises:
      ValueError: The tensors are not those that the model and the settings call for.
    """
    rank, found, known = settings["r"], set(), set()
    for path, block, name in projections(model):
        names = _tensor_names(path)
        known.update(names)
        if not _targeted(path, settings) and tensors.keys().isdisjoint(names):
            continue
        inputs, outputs = getattr(block, name).kernel.shape
        found.add(path)
        for part, shape in zip(names, ((rank, inputs), (outputs, rank)), strict=True):
            if part not in tensors:
                raise ValueError(
                    f"{file}: no tensor {part} {list(shape)}, which {CONFIG} and the "
                    "model call for"
                )
            if (given := tensors[part]).shape != shape:
                raise ValueError(
                    f"{file}: tensor {part} has shape {list(given.shape)}, expected "
                    f"{list(shape)} by {CONFIG} and the model"
                )
            if given.dtype not in DTYPES.values():
                allowed = ", ".join(DTYPES.values())
                raise ValueError(
                    f"{file}: tensor {part} has dtype {given.dtype}, expected one of "
                    f"{allowed}"
                )
    if surplus := sorted(tensors.keys() - known):
        raise ValueError(
            f"{file}: tensor {surplus[0]} is surplus: it is no LoRA of one of the "
            "model's projections"
        )
    if not found:
        raise ValueError(f"{file}: holds no tensor")
    return found


def _targeted(path: str, settings: Mapping[str, Any]) -> bool:
    """Whether settings surely call for LoRA here. Where they may not, tensors tell."""
    targets = settings.get("target_modules")
    if settings.get("layers_to_transform") is not None or settings.get(
        "exclude_modules"
    ):
        return False
    if not isinstance(targets, list):  # a regular expression
        return targets == "all-linear"
    return any(f".model.{path}".endswith(f".{target}") for target in targets)
