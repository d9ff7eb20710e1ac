"""Tokenizers that these tests share."""

import pytest

from examples.llama.text.tokenizer import load_tokenizer
from tests.examples.llama.checkpoints.llama2c_files import write_tokenizer
from tests.examples.llama.text.tokenizer_files import TINY, write_llama2, write_llama3


@pytest.fixture(scope="session")
def llama2(tmp_path_factory):
    return load_tokenizer(write_llama2(tmp_path_factory.mktemp("llama2")))


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    return load_tokenizer(write_llama3(tmp_path_factory.mktemp("llama3")))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.bin"
    return load_tokenizer(write_tokenizer(path, TINY))
