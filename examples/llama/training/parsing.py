"""From a command line, a preset and a JSON file to a configuration, and back."""

import dataclasses
import json
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tyro

from examples.files import read_json_object
from examples.llama.evaluation.questions import WORLD
from examples.llama.text.sources import HUB, parse_source
from examples.llama.training.config import SELF, Config
from examples.llama.training.presets import PRESETS

# Flags that may be given several times, each time with one more value.
_REPEATED = ("data", "regularize", "replay", "gem")


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
    start: dict[str, Any] = dict.fromkeys(("model", "data", "output"), tyro.MISSING)
    if early.preset is not None:
        start |= PRESETS[early.preset]
    if early.config is not None:
        start |= read_settings(early.config)
    for name in _REPEATED:  # flags replace the file's values, they do not add to them
        if any(x == f"--{name}" or x.startswith(f"--{name}=") for x in argv):
            start[name] = ()
    return tyro.cli(
        Config,
        prog=program,
        args=argv,
        description=description,
        default=Config(**start),
    )


@dataclasses.dataclass
class _Early:
    preset: str | None = None
    config: Path | None = None


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a JSON file, such as the config.json of another run.

    Raises:
      ValueError: It is no JSON object, or a setting is unknown or of the wrong type.
      OSError: It cannot be read.
    """
    types = typing.get_type_hints(Config, include_extras=True)
    found = {}
    for name, value in read_json_object(path).items():
        if name not in types:
            allowed = ", ".join(types)
            raise ValueError(f"{path}: unknown setting {name!r}; allowed: {allowed}")
        if name in ("preset", "config"):
            continue  # the other settings say what those two did
        try:
            found[name] = msgspec.convert(value, types[name], dec_hook=_to_path)
        except msgspec.ValidationError as error:
            raise ValueError(f"{path}: {name}: {error}, {value!r}") from None
    return found


def _to_path(kind: type, value: Any) -> Path:
    if kind is not Path or not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    return Path(value)


def settings(config: Config) -> dict[str, Any]:
    """All settings as JSON has them, which mean the same from any directory."""
    values = dataclasses.asdict(config)
    return {name: _absolute(name, value) for name, value in values.items()}


def _absolute(setting: str, value: Any) -> Any:
    """A setting with absolute paths of files, in texts too that have more than that."""
    if isinstance(value, Path):
        return str(value.resolve())
    if setting in ("data", "replay", "gem"):
        return tuple(map(_absolute_source, value))
    if setting in ("eval_data", "fisher_data", "knowledge", "importance"):
        return None if value is None else _absolute_source(value)
    return value


def _absolute_source(text: str) -> str:
    path = parse_source(text).path
    if path in (SELF, WORLD) or path.startswith(HUB):
        return text
    return f"{Path(path).resolve()}{text.removeprefix(path)}"


def same_run(config: Config, path: Path) -> None:
    """Raises ValueError unless the config.json at `path` is of the same run."""
    stored = read_json_object(path)
    # What may differ between the parts of a run, which changes nothing but rounding.
    free = {"preset", "config", "distributed", "coordinator", "processes", "process_id"}
    free |= {"mesh", "save_every", "resume_from", "keep", "report", "lora_merge"}
    free |= {"cache_dir"}
    # Through JSON, in which data's tuple is a list.
    for name, value in json.loads(json.dumps(settings(config))).items():
        if name not in free and stored.get(name) != value:
            raise ValueError(
                f"{config.output}: holds a run with {name} {stored.get(name)!r}, not "
                f"{value!r}; give another output, or the same settings to resume it"
            )
