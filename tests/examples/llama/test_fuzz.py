"""Damaged and hostile files: only documented errors come out, and nothing is written.

Files that are valid are cut, overwritten and spliced at random places.
"""

import contextlib
import io
import json
import os

import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from examples.llama.checkpoints.fisher_files import Origin, load_fisher, save_fisher
from examples.llama.checkpoints.huggingface_config import from_hugging_face
from examples.llama.checkpoints.llama2c import load_llama2c
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.sharding import fisher_sharding, make_mesh
from examples.llama.text.records import read_records
from examples.llama.text.tokenizer import load_tokenizer
from examples.llama.training.parsing import parse
from examples.llama.training.presets import PRESETS
from tests.examples.llama.checkpoints.gguf_files import (
    sentencepiece_metadata,
    write_gguf,
    write_vocabulary,
)
from tests.examples.llama.checkpoints.huggingface_files import CONFIG, write_checkpoint
from tests.examples.llama.checkpoints.llama2c_files import (
    BASE,
    write_llama2c,
    write_tokenizer,
)
from tests.examples.llama.runs import files_below

PLACE = st.integers(min_value=0)


@st.composite
def damages(draw):
    """What to do to a file: a few cuts, new bytes, repeated parts."""
    kinds = st.sampled_from(["cut", "write", "number", "repeat", "drop"])
    return [
        (draw(kinds), draw(PLACE), draw(PLACE), draw(st.binary(min_size=1, max_size=8)))
        for _ in range(draw(st.integers(1, 3)))
    ]


def apply(data, damage):
    for kind, first, second, new in damage:
        if not data:
            break
        # Headers are where most can go wrong.
        i = first % min(len(data), 4096) if first % 2 else first % len(data)
        j = i + 1 + second % 64
        if kind == "cut":
            data = data[:i]
        elif kind == "write":
            data = data[:i] + new + data[i + len(new) :]
        elif kind == "number":
            huge = (2**31 - 1 - second % 3).to_bytes(4, "little")
            data = data[: i - i % 4] + huge + data[i - i % 4 + 4 :]
        elif kind == "repeat":
            data = data[:j] + data[i:]
        else:
            data = data[:i] + data[j:]
    return data


@contextlib.contextmanager
def only_documented_errors(root):
    before = files_below(root)
    with contextlib.suppress(ValueError, OSError):
        yield
    assert files_below(root) == before


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Files of every kind that is read, by kind."""
    root = tmp_path_factory.mktemp("valid")
    write_checkpoint(root / "model")
    write_llama2c(root / "model.bin", dim=8, hidden_dim=8, n_layers=1, n_heads=2)
    write_tokenizer(root / "tokenizer.bin", ["<unk>", *BASE, " ", "a", "b", "ab"])
    write_gguf(root / "model.gguf", kind="Q4_1", **{"general.alignment": 64})
    write_vocabulary(root / "sentencepiece.gguf", sentencepiece_metadata())
    records = [
        {"question": "1?", "answer": "2"},
        {"messages": [{"role": "user", "content": "a"}] * 2},
        {"text": "b"},
        {"instruction": "c", "input": None, "output": "d"},
    ]
    records[1]["messages"][1] = {"role": "assistant", "content": "e"}
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    (root / "data.json").write_text(json.dumps(records))
    settings = {"model": "m", "data": ["d"], "output": "o", "alpha": 0.2, "steps": 3}
    (root / "config.json").write_text(json.dumps(settings))
    params = parameters(root / "model.bin")
    fisher = jax.tree.map(lambda x: x * x, params)
    save_fisher(root / "fisher.safetensors", fisher, Origin("m", 1, 2, 3))
    return root


def parameters(path):
    return nnx.split(load_model(path))[1]


def damaged(valid, name, damage):
    """A directory with the one damaged file, made anew each time."""
    path = valid.parent / f"damaged-{os.getpid()}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(apply((valid / name).read_bytes(), damage))
    return path


@given(damages())
def test_safetensors(valid, damage):
    path = damaged(valid, "model/model.safetensors", damage)
    (path.parent / "config.json").write_text(json.dumps(CONFIG))
    with only_documented_errors(path.parent):
        load_model(path.parent)


@given(damages())
def test_fisher_files(valid, damage):
    params = parameters(valid / "model.bin")
    path = damaged(valid, "fisher.safetensors", damage)
    with only_documented_errors(path.parent):
        load_fisher(path, params, fisher_sharding(make_mesh("fsdp=1")))


@given(damages())
def test_llama2c_checkpoints(valid, damage):
    path = damaged(valid, "model.bin", damage)
    with only_documented_errors(path.parent):
        load_llama2c(path)


@given(damages())
def test_llama2c_tokenizers(valid, damage):
    path = damaged(valid, "tokenizer.bin", damage)
    with only_documented_errors(path.parent):
        load_tokenizer(path).encode("abc")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@given(damage=damages())
def test_gguf(valid, load, damage):
    path = damaged(valid, "model.gguf", damage)
    with only_documented_errors(path.parent):
        load(path)


@given(damages())
def test_sentencepiece_gguf(valid, damage):
    path = damaged(valid, "sentencepiece.gguf", damage)
    with only_documented_errors(path.parent):
        load_tokenizer(path).encode("abc")


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("skip_bad", [False, True])
@given(damage=damages())
def test_records(valid, name, skip_bad, damage):
    path = damaged(valid, name, damage)
    with only_documented_errors(path.parent):
        read_records(path, skip_bad=skip_bad)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(key=st.sampled_from(sorted(CONFIG)), value=JSON, extra=JSON)
def test_model_configurations(key, value, extra):
    with contextlib.suppress(ValueError):
        from_hugging_face(CONFIG | {key: value, "rope_scaling": extra})
    with contextlib.suppress(ValueError):
        from_hugging_face(value)


def parse_file(path):
    """As the command line does, which ends with code 2 where a value is bad."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            parse([f"--config={path}"], "train", "")
        except SystemExit as end:
            assert end.code == 2


@given(key=st.sampled_from([*PRESETS["tinyllama-trace"], "x"]), value=JSON)
def test_run_configurations(valid, key, value):
    path = valid.parent / f"config-{os.getpid()}.json"
    path.write_text(
        json.dumps({"model": "m", "data": ["d"], "output": "o", key: value})
    )
    with contextlib.suppress(ValueError, OSError):
        parse_file(path)


@given(damages())
def test_damaged_run_configurations(valid, damage):
    path = damaged(valid, "config.json", damage)
    with only_documented_errors(path.parent):
        parse_file(path)
