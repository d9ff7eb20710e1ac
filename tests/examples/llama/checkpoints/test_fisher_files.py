"""Files of Fisher information: what is written, what is read and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from examples.llama.checkpoints.fisher_files import (
    Origin,
    check_destination,
    load_fisher,
    named_fisher,
    save_fisher,
)
from examples.llama.model.llama import Llama
from examples.llama.model.sharding import fisher_sharding, make_mesh
from mofo_jax.continual import FactoredFisher
from tests.examples.llama.runs import CONFIG

ORIGIN = Origin("model.bin", texts=3, max_length=16, seed=7)
EMBEDDING, NORM = "embed_tokens.embedding", "norm.scale"
UP = "layers.0.mlp.up_proj.kernel"


@pytest.fixture(scope="module")
def params():
    return nnx.split(Llama(CONFIG, rngs=nnx.Rngs(0)))[1]


def make(params, factored):
    def leaf(x):
        squares = jnp.square(x.astype(jnp.float32))
        if not factored or x.ndim < 2:
            return squares
        return FactoredFisher(squares.mean(-1), squares.mean(-2))

    return jax.tree.map(leaf, params)


def load(path, params, mesh="fsdp=1"):
    return load_fisher(path, params, fisher_sharding(make_mesh(mesh)))


@pytest.mark.parametrize("mesh", ["fsdp=1", "fsdp=4,tensor=2"])
@pytest.mark.parametrize("factored", [True, False])
def test_written_and_read(tmp_path, params, factored, mesh):
    path, fisher = tmp_path / "new" / "fisher.safetensors", make(params, factored)
    save_fisher(path, fisher, ORIGIN)
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    found, origin = load(path, params, mesh)
    assert origin == ORIGIN
    assert jax.tree.structure(found) == jax.tree.structure(fisher)
    jax.tree.map(np.testing.assert_array_equal, found, fisher)
    up = named_fisher(found)[UP]
    if factored:
        assert all(x.sharding.is_fully_replicated for x in up)
    elif mesh != "fsdp=1":
        assert up.addressable_data(0).size == up.size // 8


def test_the_format(tmp_path, params):
    """Other programs can rely on these names, dtypes and texts."""
    save_fisher(tmp_path / "a", make(params, True), ORIGIN)
    with safe_open(tmp_path / "a", "numpy") as file:
        assert file.metadata() == {
            "format": "mofo_jax.fisher",
            "version": "1",
            "model": "model.bin",
            "texts": "3",
            "max_length": "16",
            "seed": "7",
            "temperature": "1.0",
        }
    tensors = load_file(tmp_path / "a")
    assert {x.dtype for x in tensors.values()} == {np.dtype("float32")}
    assert tensors[f"{UP}/rows"].shape == (16,)
    assert tensors[f"{UP}/columns"].shape == (24,)
    assert tensors[NORM].shape == (16,) and UP not in tensors
    save_fisher(tmp_path / "b", make(params, False), ORIGIN)
    assert load_file(tmp_path / "b")[UP].shape == (16, 24)


def changed(path, params, change, metadata=None, factored=True):
    """A file with other tensors or texts than `save_fisher` would write."""
    save_fisher(path, make(params, factored), ORIGIN)
    with safe_open(path, "numpy") as file:
        texts = file.metadata() | (metadata or {})
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, texts)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


BAD = [
    (lambda x: x.pop(NORM), True, f"no tensor {NORM} [16]; the model has"),
    (lambda x: x.pop(UP), False, f"no tensor {UP} [16, 24], nor its rows and columns"),
    (lambda x: x.pop(f"{UP}/rows"), True, f"no tensor {UP}/rows [16]; the model has"),
    (put("x", np.ones(2, "f4")), True, "tensor x is surplus: the model has no such"),
    (put(UP, np.ones((16, 24), "f4")), True, f"tensor {UP} is surplus"),
    (
        put(NORM, np.ones(17, "f4")),
        True,
        f"tensor {NORM} has shape [17], expected [16] by the model",
    ),
    (
        put(f"{UP}/columns", np.ones(16, "f4")),
        True,
        f"tensor {UP}/columns has shape [16], expected [24] by the model",
    ),
    (put(NORM, np.ones(16, "f2")), True, f"tensor {NORM} has dtype F16, expected F32"),
    (
        put(NORM, np.full(16, np.nan, "f4")),
        True,
        f"tensor {NORM} must be finite and 0 or above, got nan",
    ),
    (
        put(f"{EMBEDDING}/rows", np.full(260, -1, "f4")),
        True,
        f"tensor {EMBEDDING}/rows must be finite and 0 or above, got -1.0",
    ),
]


@pytest.mark.parametrize(("change", "factored", "message"), BAD)
def test_tensors_that_do_not_fit(tmp_path, params, change, factored, message):
    path = tmp_path / "fisher.safetensors"
    changed(path, params, change, factored=factored)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load(path, params)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "format must be mofo_jax.fisher, as python -m examples."),
        ({"version": "2"}, "version must be 1, got '2'"),
        ({"texts": "few"}, "texts must be of type int in the header, got 'few'"),
    ],
)
def test_bad_headers(tmp_path, params, metadata, message):
    path = tmp_path / "fisher.safetensors"
    changed(path, params, lambda x: None, metadata)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load(path, params)


def test_missing_and_cut(tmp_path, params):
    path = tmp_path / "fisher.safetensors"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{path}: no such file")):
        load(path, params)
    save_fisher(path, make(params, True), ORIGIN)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=r"not safetensors, or damaged: .*ends at byte"
    ):
        load(path, params)


def test_bad_values_are_not_written(tmp_path, params):
    fisher = jax.tree.map(lambda x: x.at[0].set(jnp.inf), make(params, False))
    message = f"fisher: tensor {EMBEDDING} must be finite and 0 or above, got inf"
    with pytest.raises(ValueError, match=re.escape(message)):
        save_fisher(tmp_path / "fisher.safetensors", fisher, ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_overwritten(tmp_path, params):
    path = tmp_path / "new" / "fisher.safetensors"
    check_destination(path)
    save_fisher(path, make(params, True), ORIGIN)
    check_destination(path)
    other = tmp_path / "other"
    other.write_text("notes")
    for odd in (other, tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"{odd}: not overwritten")):
            check_destination(odd)
    with pytest.raises(ValueError, match=f"cannot write to {re.escape(str(other))}"):
        check_destination(other / "fisher.safetensors")
