"""Directories that a model was saved to: what is read, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama import checkpoint
from examples.llama.checkpoint import load_model, save_model
from examples.llama.convert import load_llama2c
from tests.examples.llama.llama2c_files import refused, write_llama2c


def bits(model):
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return [(path, leaf.dtype, np.asarray(leaf).tobytes()) for path, leaf in leaves]


@pytest.fixture
def model(tmp_path):
    return load_llama2c(write_llama2c(tmp_path / "model.bin", vocab_size=-50))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip(tmp_path, param_dtype):
    path = write_llama2c(tmp_path / "model.bin")
    model = load_model(path, param_dtype=param_dtype)
    scale = model.norm.scale
    odd = jnp.array([-0.0, 1e-38, jnp.inf, jnp.nan], param_dtype)
    scale[...] = scale[...].at[:4].set(odd)
    save_model(model, tmp_path / "new" / "saved")
    loaded = load_model(tmp_path / "new" / "saved", param_dtype=param_dtype)
    assert bits(loaded) == bits(model)
    assert nnx.graphdef(loaded) == nnx.graphdef(model)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["saved"]
    other = jnp.bfloat16 if param_dtype == jnp.float32 else jnp.float32
    cast = load_model(tmp_path / "new" / "saved", param_dtype=other)
    np.testing.assert_array_equal(
        cast.embed_tokens.embedding[...], model.embed_tokens.embedding.astype(other)
    )


def test_save_replaces_a_saved_model(tmp_path, model):
    path = tmp_path / "saved"
    path.mkdir()  # an empty directory is no obstacle either
    save_model(model, path)
    model.norm.scale[...] += 1
    save_model(model, path)
    assert bits(load_model(path)) == bits(model)
    assert {p.name for p in path.iterdir()} == {"config.json", "params"}
    assert {p.name for p in tmp_path.iterdir()} == {"model.bin", "saved"}


@pytest.mark.parametrize("names", [["notes.txt"], ["config.json", "model.safetensors"]])
def test_save_refuses_other_directories(tmp_path, model, names):
    for name in names:
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text("mine")
    with refused(f"{tmp_path / 'mine'}: not overwritten"):
        save_model(model, tmp_path / "mine")
    assert {p.name: p.read_text() for p in (tmp_path / "mine").iterdir()} == (
        dict.fromkeys(names, "mine")
    )
    with refused("model.bin: not overwritten"):
        save_model(model, tmp_path / "model.bin")


class Killed(BaseException):
    """As a signal would be: nothing in between catches it."""


@pytest.mark.parametrize("moment", ["parameters", "first rename", "second rename"])
def test_killed_while_saving(tmp_path, model, monkeypatch, moment):
    path = tmp_path / "saved"
    save_model(model, path)
    before = bits(model)
    model.norm.scale[...] += 1
    with monkeypatch.context() as patch:
        if moment == "parameters":

            def kill(self, path, params):
                path.mkdir()
                (path / "half").write_text("written")
                raise Killed

            patch.setattr(checkpoint.ocp.StandardCheckpointer, "save", kill)
        else:
            renames = []
            rename = Path.rename

            def kill(self, target):
                renames.append(target)
                if len(renames) == ["first rename", "second rename"].index(moment) + 1:
                    raise Killed
                return rename(self, target)

            patch.setattr(Path, "rename", kill)  # Orbax uses os.rename
        with pytest.raises(Killed):
            save_model(model, path)
    if moment == "second rename":
        assert not path.exists()
        assert bits(load_model(tmp_path / ".saved.previous")) == before
    else:
        assert bits(load_model(path)) == before
    save_model(model, path)
    assert bits(load_model(path)) == bits(model)
    assert {p.name for p in tmp_path.iterdir()} == {"model.bin", "saved"}


@pytest.mark.parametrize("name", ["config.json", "params"])
def test_incomplete_directory(tmp_path, model, name):
    save_model(model, tmp_path / "saved")
    (tmp_path / "saved" / name).rename(tmp_path / "elsewhere")
    with refused(f"{tmp_path / 'saved'}: not a model of save_model, it has no {name}"):
        load_model(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "shape of layers.2.input_layernorm.scale is None, "),
        ({"tie_word_embeddings": True}, "shape of lm_head.kernel is (32, 50), "),
        (
            {"intermediate_size": 41},
            "layers.0.mlp.down_proj.kernel is (40, 32), expected (41, 32) by config",
        ),
        ({"vocab_size": -1}, "config.json: vocab_size must be a positive int, got -1"),
        ({"dropout": 0.1}, "config.json: not a LlamaConfig: "),
        ("{", "config.json: Expecting property name"),
        ("[1]", "config.json: not a LlamaConfig: "),
    ],
)
def test_config_that_does_not_fit(tmp_path, model, change, message):
    save_model(model, tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    with refused(message):
        load_model(tmp_path / "saved")


def test_damaged_parameters(tmp_path, model):
    save_model(model, tmp_path / "saved")
    params = tmp_path / "saved" / "params"
    files = [path for path in params.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    # In its own process, because Orbax leaves coroutines behind that fail later.
    code = "import sys, examples.llama.checkpoint as c; c.load_model(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(params.parent)],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    message = f"ValueError: {re.escape(str(params))}: cannot be read: .{{20,170}}"
    assert re.search(f"^{message}$", result.stderr, re.MULTILINE)


def test_damaged_metadata(tmp_path, model):
    save_model(model, tmp_path / "saved")
    params = tmp_path / "saved" / "params"
    (params / "_METADATA").unlink()
    with refused(f"{params}: damaged, or not a checkpoint of Orbax"):
        load_model(tmp_path / "saved")
