"""Hugging Face checkpoints: what is read, what is refused, and what is written."""

import json
import math
import pickle
import resource
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from examples.llama.checkpoints import huggingface
from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.checkpoints.huggingface_config import (
    from_hugging_face,
    to_hugging_face,
)
from examples.llama.checkpoints.llama2c import load_llama2c
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.architectures import ARCHITECTURES
from examples.llama.model.lora import add_lora
from examples.llama.model.parameters import named_parameters
from examples.llama.model.sharding import make_mesh, parameter_sharding
from tests.examples.llama.checkpoints.huggingface_files import (
    CONFIG,
    LLAMA3,
    random_tensors,
    read_index,
    tensor_shapes,
    write_checkpoint,
    write_index,
)
from tests.examples.llama.checkpoints.llama2c_files import refused, write_llama2c
from tests.processes import run_pair

INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


def bits(model):
    params = named_parameters(model).items()
    return {name: (x.dtype, np.asarray(x).tobytes()) for name, x in params}


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.fixture
def model(tmp_path):
    return load_model(write_checkpoint(tmp_path / "source"))


# Reading


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("mesh", [None, "fsdp=4,tensor=2", "data=2,fsdp=2"])
def test_tensors_arrive(tmp_path, files, mesh):
    tensors = random_tensors()
    # Old files have these, of the rotary embeddings, and they are not needed.
    surplus = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, "f4")}
    path = write_checkpoint(tmp_path / "model", tensors | surplus, files=files)
    sharding = None if mesh is None else parameter_sharding(make_mesh(mesh))
    model = load_model(path, dtype=jnp.bfloat16, sharding=sharding)
    assert model.dtype == jnp.bfloat16
    params = named_parameters(model)
    assert len(params) == len(tensors)
    for name, param in params.items():
        module, _, kind = name.rpartition(".")
        tensor = tensors[("" if module == "lm_head" else "model.") + module + ".weight"]
        np.testing.assert_array_equal(param, tensor.T if kind == "kernel" else tensor)
        if mesh is not None:
            assert param.sharding == sharding(name, param.shape)
    assert model.config.head_dim == 12


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(tmp_path, stored, param_dtype):
    tensors = random_tensors(stored)
    path = write_checkpoint(tmp_path / "model", tensors)
    params = named_parameters(load_model(path, param_dtype=param_dtype))
    expected = tensors["model.norm.weight"].astype(param_dtype)
    assert params["norm.scale"].dtype == param_dtype
    np.testing.assert_array_equal(params["norm.scale"], expected)


def test_tied_head(tmp_path):
    tied = {"tie_word_embeddings": True, "vocab_size": 4100}
    tensors = random_tensors(config=CONFIG | tied)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.copy()
    model = load_model(write_checkpoint(tmp_path / "equal", tensors, **tied))
    assert "lm_head.kernel" not in named_parameters(model)
    np.testing.assert_array_equal(model.head(), embedding.T)
    tensors["lm_head.weight"][-1, -1] += 1
    path = write_checkpoint(tmp_path / "other", tensors, **tied)
    file = path / "model.safetensors"
    with refused(f"{file}: tensor lm_head.weight differs from model.embed_tokens"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (
            {"rope_theta": 1.0, "rope_parameters": {"rope_type": "default"}},
            {"rope_theta": 1.0},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        ({"rope_scaling": LLAMA3 | {"type": "llama3"}}, {"rope_scaling": LLAMA3}),
        (
            {
                "rope_scaling": None,
                "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5},
            },
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"head_dim": None}, {"head_dim": 8}),
        ({"attention_dropout": 0.1, "pretraining_tp": 1}, {}),
    ],
)
def test_configuration(change, expected):
    config = from_hugging_face(CONFIG | change)
    like = from_hugging_face(CONFIG)
    for name, value in vars(config).items():
        if name == "rope_scaling" and value is not None:
            value = {key: getattr(value, key) for key in LLAMA3}
        assert value == expected.get(name, getattr(like, name))


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_configuration_round_trip(config):
    values = json.loads(json.dumps(to_hugging_face(config)))
    assert from_hugging_face(values) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type must be 'llama', got 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None, got"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"vocab_size": "48"}, "vocab_size must be a positive int, got '48'"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive float, got None"),
        ({"rope_theta": -1}, "rope_theta must be a positive float, got -1"),
        ({"rope_theta": math.inf}, "rope_theta must be 1.2e-38 to 3.4e+38, got inf"),
        (
            {"max_position_embeddings": 10**12},
            "max_position_embeddings must be 1 to 16777216, got 1000000000000",
        ),
        (
            {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "factor": math.inf}},
            "rope_scaling: factor must be 1.2e-38 to 3.4e+38, got inf",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling: rope_type must be default or llama3, got linear",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters: rope_type must be default or llama3, got yarn",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling: rope_type llama3 needs low_freq_factor, found none",
        ),
        (
            {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "factor": "8"}},
            "rope_scaling: factor must be a positive float, got '8'",
        ),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object, got 'llama3'"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers is 1000000000, but ",
        ),
        ("{", "not JSON: Expecting property name"),
        ("\ud800".encode("utf-16-le", "surrogatepass"), "not JSON: 'utf-8' codec"),
        ("[1]", "must be an object, got list"),
        ("[" * 100_000, "not JSON: "),
    ],
)
def test_configuration_refused(tmp_path, change, message):
    path = write_checkpoint(tmp_path / "model")
    if isinstance(change, dict):
        change = json.dumps(CONFIG | change)
    data = change if isinstance(change, bytes) else change.encode()
    (path / "config.json").write_bytes(data)
    with refused(f"{path / 'config.json'}: {message}"):
        load_model(path)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("name", ["model.norm.weight", UP, "lm_head.weight"])
def test_tensors_refused(tmp_path, files, name):
    tensors = random_tensors()
    where = list(tensors).index(name) % files + 1
    file = f"model-{where:05}-of-{files:05}.safetensors"
    file = "model.safetensors" if files == 1 else file

    def refuses(tensors, message):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        write_checkpoint(path, tensors, files=files)
        with refused(
            message.replace("FILE", str(path / file)).replace("AT", str(path))
        ):
            load_model(path)

    shape = list(tensor_shapes()[name])
    missing = {n: x for n, x in tensors.items() if n != name}
    refuses(missing, f"AT: no tensor {name} {shape}, which config.json calls for")
    longer = tensors | {name: np.append(tensors[name], tensors[name][:1], axis=0)}
    found, expected = [shape[0] + 1, *shape[1:]], f"expected {shape} by config.json"
    refuses(longer, f"FILE: tensor {name} has shape {found}, {expected}")
    if len(shape) == 2:
        transposed = tensors | {name: np.ascontiguousarray(tensors[name].T)}
        refuses(transposed, f"FILE: tensor {name} has shape {shape[::-1]}, {expected}")
    for dtype, code in (("int8", "I8"), ("float64", "F64")):
        odd = tensors | {name: tensors[name].astype(dtype)}
        allowed = "expected one of F32, BF16, F16"
        refuses(odd, f"FILE: tensor {name} has dtype {code}, {allowed}")


@pytest.mark.parametrize("files", [1, 3])
def test_surplus_tensor(tmp_path, files):
    name = "model.layers.2.mlp.up_proj.weight"
    tensors = {name: np.ones((40, 32), "f4")} | random_tensors()
    path = write_checkpoint(tmp_path / "model", tensors, files=files)
    file = "model.safetensors" if files == 1 else "model-00001-of-00003.safetensors"
    with refused(f"{path / file}: tensor {name} is surplus, config.json calls for no"):
        load_model(path)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "model-00002-of-00003.safetensors"]
)
def test_damaged_file(tmp_path, file):
    path = write_checkpoint(
        tmp_path / "model", files=1 if file == "model.safetensors" else 3
    )
    path = path / file
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    ends = {
        name: start + entry["data_offsets"][1]
        for name, entry in header.items()
        if name != "__metadata__"
    }
    for name, end in ends.items():
        path.write_bytes(data[: end - 1])
        cut = f"{end - 1} bytes, but tensor {name} ends at byte {end}"
        with refused(f"{path}: not safetensors, or damaged: ") as raised:
            load_model(path.parent)
        assert str(raised.value).endswith(cut)
    negative = data[:8] + data[8:].replace(
        b'"data_offsets":[0,', b'"data_offsets":[-,', 1
    )
    for junk in (
        b"",
        data[:7],
        data[: start - 1],
        data + b"\0",
        b"\xff" * 100,
        b"PK\3\4" + bytes(200),
        pickle.dumps(list(range(100))),
        struct.pack("<Q", 2) + b"[]",
        negative,
    ):
        path.write_bytes(junk)
        with refused(f"{path}: not safetensors, or damaged: "):
            load_model(path.parent)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"]
)
def test_pickles_are_not_opened(tmp_path, name):
    path = write_checkpoint(tmp_path / "model")
    trap = pickle.dumps(Touch(tmp_path / "executed"))
    (path / name).write_bytes(trap)
    load_model(path)
    (path / "model.safetensors").unlink()
    message = (
        f"{path}: expected model.safetensors, or {INDEX} and its files: {name} is a "
        "pickle, which is never opened"
    )
    with refused(message):
        load_model(path)
    (path / "model.safetensors").write_bytes(trap)
    with refused("not safetensors, or damaged"):
        load_model(path)
    assert not (tmp_path / "executed").exists()


def test_incomplete_directory(tmp_path):
    path = write_checkpoint(tmp_path / "model")
    (path / "config.json").unlink()
    with refused(f"{path}: not a Hugging Face model, no config.json"):
        load_model(path)
    (path / "model.safetensors").rename(path / "other.safetensors")
    with refused(f"{path}: expected model.safetensors, or {INDEX} and its files"):
        load_model(path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "sub/file.safetensors",
        "sub\\file.safetensors",
        "..",
        "pytorch_model.bin",
        "",
        "a\0.safetensors",
        "a.safetensors\n",
        7,
        None,
    ],
)
def test_index_is_confined_to_its_directory(tmp_path, name):
    path = write_checkpoint(tmp_path / "model", files=3)
    files = read_index(path)
    for outside in (tmp_path, path / "sub"):
        outside.mkdir(exist_ok=True)
        save_file(random_tensors(), outside / "outside.safetensors")
        save_file(random_tensors(), outside / "file.safetensors")
    write_index(path, files | {UP: name})
    message = f"file of {UP} must be a .safetensors beside it, "
    with refused(f"{path / INDEX}: {message}") as raised:
        load_model(path)
    assert str(raised.value).endswith(f"got {name!r}")


def test_index_that_does_not_fit(tmp_path):
    path = write_checkpoint(tmp_path / "model", files=3)
    files = read_index(path)
    home, other = files[UP], max(files.values())
    assert home < other

    def refuses(message):
        with refused(message):
            load_model(path)

    write_index(path, files | {UP: other})
    refuses(f"{path / home}: holds tensor {UP}, which {INDEX} has in {other}")
    write_index(path, {n: file for n, file in files.items() if n != UP})
    refuses(f"{path / home}: holds tensor {UP}, which {INDEX} has in None")
    write_index(path, files | {"model.extra.weight": other})
    refuses(f"{path / other}: no tensor model.extra.weight, which {INDEX} has there")
    write_index(path, files | {UP: "model-absent.safetensors"})
    refuses(f"{path / INDEX}: lists model-absent.safetensors, which is not there")
    write_index(path, files)
    (path / other).rename(path / "elsewhere")
    refuses(f"{path / INDEX}: lists {other}, which is not there")
    for content in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'):
        (path / INDEX).write_text(content)
        refuses(f"{path / INDEX}: weight_map must name each tensor's file")
    (path / INDEX).write_text("{")
    refuses(f"{path / INDEX}: not JSON: ")
    # As transformers does, one whole file is taken before an index.
    save_file(random_tensors(), path / "model.safetensors")
    load_model(path)


# Writing


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, param_dtype, tied):
    scaling = {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 5e5}
    source = write_checkpoint(tmp_path / "source", tie_word_embeddings=tied, **scaling)
    model = load_model(source, param_dtype=param_dtype)
    scale = model.norm.scale
    smallest = jnp.finfo(param_dtype).smallest_subnormal
    odd = jnp.array([-0.0, smallest, jnp.inf, jnp.nan], param_dtype)
    scale[...] = scale[...].at[:4].set(odd)
    save_hugging_face(model, tmp_path / "new" / "saved")
    loaded = load_model(tmp_path / "new" / "saved", param_dtype=param_dtype)
    assert bits(loaded) == bits(model)
    assert nnx.graphdef(loaded) == nnx.graphdef(model)
    assert loaded.config == model.config
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["saved"]
    stored = load_file(tmp_path / "new" / "saved" / "model.safetensors")
    shapes = tensor_shapes(CONFIG | {"tie_word_embeddings": tied})
    assert {name: x.shape for name, x in stored.items()} == shapes
    assert {x.dtype for x in stored.values()} == {jnp.dtype(param_dtype)}


def test_all_bfloat16_come_back(tmp_path, model):
    """Every bit pattern, the payloads of NaN included."""
    config = CONFIG | {"vocab_size": 2048}
    tensors = random_tensors("bfloat16", config)
    patterns = np.arange(1 << 16, dtype=np.uint16).reshape(2048, 32).view(jnp.bfloat16)
    tensors["model.embed_tokens.weight"] = patterns
    tensors["lm_head.weight"] = patterns[::-1].copy()
    source = write_checkpoint(tmp_path / "bfloat16", tensors, vocab_size=2048)
    sharding = parameter_sharding(make_mesh("fsdp=2,tensor=2"))
    model = load_model(source, param_dtype=jnp.bfloat16, sharding=sharding)
    save_hugging_face(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert saved[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_saved_in_another_dtype(tmp_path, model, dtype):
    save_hugging_face(model, tmp_path / "saved", dtype=dtype)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["torch_dtype"] == jnp.dtype(dtype).name
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    for name, tensor in random_tensors().items():
        assert stored[name].tobytes() == tensor.astype(dtype).tobytes()


def test_a_part_in_each_file(tmp_path, model):
    total = sum(x.nbytes for x in random_tensors().values())
    largest = max(x.nbytes for x in random_tensors().values())
    before = bits(model)
    for limit in (total, total - 1, 20_000, largest - 1, 1):
        save_hugging_face(model, tmp_path / "saved", max_shard_bytes=limit)
        files = sorted((tmp_path / "saved").glob("*.safetensors"))
        names = [file.name for file in files]
        assert bits(load_model(tmp_path / "saved")) == before
        if limit == total:
            assert names == ["model.safetensors"]
            assert not (tmp_path / "saved" / INDEX).exists()
            continue
        count = len(files)
        assert count >= total / max(limit, largest)
        assert names == [
            f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
        ]
        for file in files:
            stored = load_file(file)
            assert len(stored) == 1 or sum(x.nbytes for x in stored.values()) <= limit
            assert {read_index(file.parent)[name] for name in stored} == {file.name}
        index = json.loads((tmp_path / "saved" / INDEX).read_text())
        assert index["metadata"] == {"total_size": total}
    assert count == len(random_tensors())


def test_what_is_carried_over(tmp_path, model):
    source = tmp_path / "source"
    generation = b'{"eos_token_id": [2, 7],   "temperature": 0.6}'
    (source / "generation_config.json").write_bytes(generation)
    (source / "notes.txt").write_text("mine")
    path = tmp_path / "saved"
    save_hugging_face(model, path, source=source)
    config = json.loads((path / "config.json").read_text())
    assert config["bos_token_id"] == 1
    assert config["eos_token_id"] == [2, 7]
    assert "pad_token_id" not in config
    assert set(contents(path)) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert (path / "generation_config.json").read_bytes() == generation
    # From itself, as when training resumes from what it saved.
    save_hugging_face(model, path, source=path)
    assert json.loads((path / "config.json").read_text()) == config
    assert (path / "generation_config.json").read_bytes() == generation
    # A llama2.c file has nothing of it, nor does a model without a source.
    file = write_llama2c(tmp_path / "model.bin")
    save_hugging_face(load_llama2c(file), path, source=file)
    assert set(contents(path)) == {"config.json", "model.safetensors"}
    with refused(f"{tmp_path / 'absent'}: not a Hugging Face model, no config.json"):
        save_hugging_face(model, path, source=tmp_path / "absent")


def test_save_replaces_a_saved_model(tmp_path, model):
    path = tmp_path / "saved"
    path.mkdir()  # an empty directory is no obstacle either
    save_hugging_face(model, path, max_shard_bytes=10_000)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_text("of this model")
    model.norm.scale[...] += 1
    save_hugging_face(model, path)
    assert bits(load_model(path)) == bits(model)
    assert {p.name for p in path.iterdir()} == {"config.json", "model.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == {"source", "saved"}


def test_save_refuses_other_directories(tmp_path, model):
    def refuses(path, culprit):
        before = contents(path)
        with refused(f"{path}: not overwritten") as raised:
            save_hugging_face(model, path)
        assert str(raised.value).endswith(culprit)
        assert contents(path) == before

    # Written by another program, such as the checkpoint that training began with.
    refuses(tmp_path / "source", ": model.safetensors")
    save_hugging_face(model, tmp_path / "saved")
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    refuses(tmp_path / "saved", ": notes.txt")
    (tmp_path / "configured").mkdir()
    (tmp_path / "configured" / "config.json").write_text("mine")
    refuses(tmp_path / "configured", "saved to")
    file = write_llama2c(tmp_path / "model.bin")
    data = file.read_bytes()
    with refused(f"{file}: not overwritten"):
        save_hugging_face(model, file)
    assert file.read_bytes() == data
    assert {p.name for p in tmp_path.iterdir()} == (
        {"source", "saved", "configured", "model.bin"}
    )


def test_save_refuses_arguments(tmp_path, model):
    path = tmp_path / "saved"
    with refused("dtype must be one of float32, bfloat16, float16; got int8"):
        save_hugging_face(model, path, dtype=jnp.int8)
    with refused("max_shard_bytes must be 1 or above, got 0"):
        save_hugging_face(model, path, max_shard_bytes=0)
    kernel = model.lm_head.kernel[...].astype(jnp.bfloat16)
    model.lm_head.kernel = nnx.Param(kernel)
    with refused(
        "dtype must be one of float32, bfloat16, float16; got bfloat16, float"
    ):
        save_hugging_face(model, path)
    add_lora(model, rank=2, alpha=4.0, rngs=nnx.Rngs(0))
    message = "model: shape of layers.0.mlp.down_proj.lora_a is (40, 2), expected None"
    with refused(message):
        save_hugging_face(model, path, dtype=jnp.float32)
    assert not path.exists()


class Killed(BaseException):
    """As a signal would be: nothing in between catches it."""


@pytest.mark.parametrize("moment", ["tensors", "first rename", "second rename"])
def test_killed_while_saving(tmp_path, model, monkeypatch, moment):
    path = tmp_path / "saved"
    save_hugging_face(model, path)
    before = bits(model)
    model.norm.scale[...] += 1
    with monkeypatch.context() as patch:
        if moment == "tensors":
            write = huggingface.write_tensors

            def kill(*args):
                write(*args)
                raise Killed

            patch.setattr(huggingface, "write_tensors", kill)
        else:
            renames = []
            rename = Path.rename

            def kill(self, target):
                renames.append(target)
                if len(renames) == ["first rename", "second rename"].index(moment) + 1:
                    raise Killed
                return rename(self, target)

            patch.setattr(Path, "rename", kill)
        with pytest.raises(Killed):
            save_hugging_face(model, path)
    if moment == "second rename":
        assert not path.exists()
        assert bits(load_model(tmp_path / ".saved.previous")) == before
    else:
        assert bits(load_model(path)) == before
    save_hugging_face(model, path)
    assert bits(load_model(path)) == bits(model)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "saved"}


def test_disk_that_takes_no_more(tmp_path, model):
    """By a limit on the size of a file, for which the system has an error as well."""
    path = tmp_path / "saved"
    save_hugging_face(model, path)
    before = contents(path)
    model.norm.scale[...] += 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_hugging_face(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(path) == before
    assert {p.name for p in tmp_path.iterdir()} == {"source", "saved"}


def test_two_processes(tmp_path):
    write_checkpoint(tmp_path / "source", random_tensors("bfloat16"), files=2)
    source = contents(tmp_path / "source")
    outputs = run_pair(Path(__file__).with_name("huggingface_processes.py"), tmp_path)

    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2
    saved = {name: x for file in files for name, x in load_file(file).items()}
    expected = random_tensors("bfloat16")
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert saved[name].tobytes() == tensor.tobytes()
    # The first process says what is wrong, and the other one does not wait for it.
    first, second = (out.splitlines()[-2:] for out, _ in outputs)
    assert first[0].startswith(f"{tmp_path / 'source'}: not overwritten")
    assert first[1].startswith(f"{tmp_path / 'absent'}: not a Hugging Face model")
    said = "the first process could not save there"
    assert second == [f"{tmp_path / name}: {said}" for name in ("source", "new")]
    assert contents(tmp_path / "source") == source
    assert {p.name for p in tmp_path.iterdir()} == {"source", "saved"}
