"""The files that a run reads, and digests that tell whether they are the same."""

import re
from collections.abc import Iterator
from pathlib import Path

from examples.files import read_json_object, sha256
from examples.llama.checkpoints.directories import TOKENIZER
from examples.llama.evaluation.questions import WORLD
from examples.llama.text.tokenizer import tokenizer_path
from examples.llama.training.config import SELF, Config

FILE = "inputs.json"
# Of a directory of Hugging Face's; what else is there, as a README, changes nothing.
_MODEL = re.compile(rf"(generation_)?config\.json|.*\.safetensors|{TOKENIZER}")
_TOKENIZER = re.compile(TOKENIZER)


def digests(config: Config) -> dict[str, str]:
    """The SHA-256 digest of each file that a run reads, by the file's path.

    Data sets of the hub are not among them, nor what the packages of world carry.
    """
    return {str(path): sha256(path) for path in sorted(set(_files(config)))}


def check_same(config: Config, path: Path) -> None:
    """Raises ValueError, which names the file, where one differs from those at `path`.

    Args:
      config: Of the run that is resumed.
      path: What `digests` gave when the run began, as JSON.
    """
    stored, found = read_json_object(path), digests(config)
    for name in sorted(stored.keys() | found.keys()):
        if stored.get(name) == found.get(name):
            continue
        change = "has changed"
        if name not in found:
            change = "is gone"
        elif name not in stored:
            change = "is new"
        raise ValueError(
            f"{name}: {change} since the run in {config.output} began; restore it, or "
            "give another output"
        )


def _files(config: Config) -> Iterator[Path]:
    yield from _of_directory(config.model, _MODEL)
    yield from _of_directory(tokenizer_path(config.tokenizer, config.model), _TOKENIZER)
    for path in config.record_files:
        yield path.resolve()
    if config.retain_data is not None:
        yield config.retain_data.resolve()
    for name, made in ((config.knowledge, WORLD), (config.importance_source, SELF)):
        if name not in (None, made):
            yield Path(name).resolve()


def _of_directory(path: Path, names: re.Pattern[str]) -> Iterator[Path]:
    path = path.resolve()
    if not path.is_dir():
        yield path
        return
    for file in path.iterdir():
        if file.is_file() and names.fullmatch(file.name):
            yield file
