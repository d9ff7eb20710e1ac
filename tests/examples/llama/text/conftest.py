"""Tokenizers of Hugging Face's form that these tests share."""

import pytest

from examples.llama.text.tokenizer import load_tokenizer
from tests.examples.llama.text.tokenizer_files import write_llama2, write_llama3


@pytest.fixture(scope="session")
def llama2(tmp_path_factory):
    return load_tokenizer(write_llama2(tmp_path_factory.mktemp("llama2")))


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    return load_tokenizer(write_llama3(tmp_path_factory.mktemp("llama3")))
