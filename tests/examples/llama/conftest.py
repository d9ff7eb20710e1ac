"""The real model that these tests share. It is not part of the repository."""

import functools
from pathlib import Path

import pytest

from examples.llama.checkpoints.llama2c import load_llama2c
from examples.llama.text.tokenizer import load_tokenizer
from examples.llama.training.loop import train
from tests.examples.llama.runs import config_of, write_files


@pytest.fixture(scope="session")
def data_dir():
    root = Path(__file__).parents[3]
    path = root.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs ../shared/data beside the repository, which is not there")
    return path


@pytest.fixture(scope="session")
def stories_model(data_dir):
    return load_llama2c(data_dir / "stories260K.bin")


@pytest.fixture(scope="session")
def stories_tokenizer(data_dir):
    return load_tokenizer(data_dir / "tok512.bin", vocab_size=512)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model and its data, as arguments of Config."""
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """Trains into a new directory; returns that and the final numbers, each once."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name, **changes):
        return root / name, train(config_of(files, root / name, **changes))

    return run
