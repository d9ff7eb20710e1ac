"""The real model that these tests share. It is not part of the repository."""

from pathlib import Path

import pytest

from examples import compilation
from examples.llama.convert import load_llama2c
from examples.llama.tokenizer import load_tokenizer


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


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Runs of one shape share what they compile, also over the workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    with compilation.kept_in(shared / "compiled"):
        yield
