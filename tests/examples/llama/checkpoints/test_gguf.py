"""GGUF files: what is read, what is refused, and what is written."""

import dataclasses
import math
import re
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFReader

from examples.gguf_files import KINDS, read_header
from examples.llama.checkpoints.gguf_config import from_gguf
from examples.llama.checkpoints.gguf_export import save_gguf
from examples.llama.checkpoints.gguf_model import load_gguf
from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.checkpoints.smollm2 import smollm2_path
from examples.llama.convert import main
from examples.llama.model.architectures import RopeScaling
from examples.llama.model.llama import rope_frequencies
from examples.llama.model.parameters import named_parameters
from examples.llama.model.sharding import make_mesh, parameter_sharding
from examples.llama.text.tokenizer import load_tokenizer, tokenizer_path
from tests.examples.llama.checkpoints.gguf_files import CONFIG, write_gguf
from tests.examples.llama.checkpoints.huggingface_files import (
    random_tensors,
    write_checkpoint,
)
from tests.examples.llama.checkpoints.llama2c_files import refused
from tests.examples.llama.text.tokenizer_files import CHATML_TEMPLATE

SCALING = RopeScaling(
    factor=10.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def same_parameters(found, expected):
    found, expected = named_parameters(found), named_parameters(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("mesh", [None, "fsdp=4,tensor=2"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(tmp_path, kind, mesh):
    """The same weights as from Hugging Face's files, whose heads are not permuted."""
    if mesh and kind not in ("F32", "Q8_0", "Q6_K"):
        pytest.skip("the others differ in the package's function alone")
    tensors = write_gguf(tmp_path / "model.gguf", kind=kind)
    write_checkpoint(tmp_path / "model", tensors, **CONFIG)
    sharding = None if mesh is None else parameter_sharding(make_mesh(mesh))
    found = load_model(tmp_path / "model.gguf", sharding=sharding)
    expected = load_model(tmp_path / "model")
    assert found.config == expected.config
    same_parameters(found, expected)


def test_dtypes(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, kind="Q4_0")
    model = load_gguf(path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    exact = named_parameters(load_gguf(path))
    for name, param in named_parameters(model).items():
        np.testing.assert_array_equal(param, exact[name].astype(jnp.bfloat16))


def test_name_does_not_matter(tmp_path):
    write_gguf(tmp_path / "blob")
    assert load_model(tmp_path / "blob").config.hidden_size == 256
    assert tokenizer_path(None, tmp_path / "blob") == tmp_path / "blob"


def test_missing_file(tmp_path):
    for load in (load_model, load_gguf, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
            load(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"llama.vocab_size": None}, {}),  # as many as tokens
        ({"llama.rope.freq_base": None}, {}),
        ({"llama.rope.freq_base": 5e5}, {"rope_theta": 5e5}),
        ({"llama.rope.dimension_count": None}, {}),  # hidden_size / heads
        ({"llama.attention.key_length": 64}, {}),
        ({"llama.expert_count": 0, "llama.rope.scaling.factor": 1.0}, {}),
        ({"llama.attention.layer_norm_rms_epsilon": 1e-6}, {"rms_norm_eps": 1e-6}),
    ],
)
def test_configuration(tmp_path, changes, fields):
    write_gguf(tmp_path / "plain.gguf")
    write_gguf(tmp_path / "model.gguf", **changes)
    plain = from_gguf(read_header(tmp_path / "plain.gguf"))
    found = from_gguf(read_header(tmp_path / "model.gguf"))
    assert found == dataclasses.replace(plain, **fields)


def test_queries_share_heads_by_default(tmp_path):
    config = CONFIG | {"num_key_value_heads": 4}
    path = tmp_path / "model.gguf"
    write_gguf(path, config=config, **{"llama.attention.head_count_kv": None})
    assert load_gguf(path).config.num_key_value_heads == 4


def test_tied_embeddings(tmp_path):
    tensors = random_tensors(config=CONFIG)
    del tensors["lm_head.weight"]
    write_gguf(tmp_path / "model.gguf", tensors)
    model = load_gguf(tmp_path / "model.gguf")
    assert model.config.tie_word_embeddings
    assert "lm_head.kernel" not in named_parameters(model)


def rope_factors(head_dim, theta, scaling=SCALING):
    """As llama.cpp's converter has them."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        original = scaling.original_max_position_embeddings
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original:
            factors.append(scaling.factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_frequencies(tmp_path):
    factors = rope_factors(64, 5e5)
    assert len(set(factors.tolist())) > 3
    path = tmp_path / "model.gguf"
    more = {"rope_freqs.weight": factors}
    write_gguf(path, more=more, **{"llama.rope.freq_base": 5e5})
    config = load_gguf(path).config
    assert config.rope_scaling == SCALING
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    np.testing.assert_allclose(rope_frequencies(config), plain / factors, rtol=1e-6)

    more = {"rope_freqs.weight": np.ones(32, np.float32)}
    write_gguf(path, more=more, **{"llama.rope.freq_base": 5e5})
    assert load_gguf(path).config.rope_scaling is None
    for wrong, message in (
        (
            factors[::-1].copy(),
            "tensor rope_freqs.weight must have the factors of Llama",
        ),
        (factors * np.float32(np.nan), "factor must be a positive float, got nan"),
        (factors[:-1], "tensor rope_freqs.weight has shape [31], expected [32]"),
    ):
        more = {"rope_freqs.weight": wrong}
        write_gguf(path, more=more, **{"llama.rope.freq_base": 5e5})
        with refused(message):
            load_gguf(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general.architecture": "qwen2"},
            "general.architecture must be 'llama', got 'qwen2'",
        ),
        ({"llama.block_count": None}, "no key llama.block_count"),
        (
            {"llama.block_count": 9999},
            "llama.block_count is 9999, but the file holds 12",
        ),
        ({"llama.block_count": 2}, "no tensor blk.1.attn_norm.weight [256]"),
        ({"llama.block_count": 0}, "num_hidden_layers must be a positive int, got 0"),
        ({"llama.block_count": "1"}, "llama.block_count must be of type int, got str"),
        (
            {"llama.rope.freq_base": math.inf},
            "rope_theta must be 1.2e-38 to 3.4e+38, got inf",
        ),
        (
            {"llama.context_length": 4_000_000_000},
            "max_position_embeddings must be 1 to 16777216, got 4000000000",
        ),
        (
            {"llama.attention.head_count": [4, 4]},
            "llama.attention.head_count must be of type int, got ndarray",
        ),
        ({"llama.attention.head_count": 3}, "num_key_value_heads must divide"),
        ({"llama.expert_count": 8}, "llama.expert_count must be 0, got 8"),
        (
            {"llama.rope.scaling.factor": 2.0},
            "llama.rope.scaling.factor must be 1.0, got 2.0",
        ),
        (
            {"llama.attention.key_length": 32},
            "must be the same size of a head: {'llama",
        ),
        (
            {"llama.feed_forward_length": 128},
            "tensor blk.0.ffn_gate.weight has shape [256, 256], expected [128, 256]",
        ),
        (
            {"llama.vocab_size": 47},
            "token_embd.weight has shape [48, 256], expected [47",
        ),
        ({"general.alignment": 3}, "general.alignment must be a power of two, got 3"),
    ],
)
def test_metadata_refused(tmp_path, changes, message):
    path = tmp_path / "model.gguf"
    write_gguf(path, **changes)
    with pytest.raises(ValueError, match=f"{path}: .*{re.escape(message)}"):
        load_model(path)


def test_tensors_refused(tmp_path):
    path = tmp_path / "model.gguf"
    bias = {"blk.0.attn_q.bias": np.zeros(256, np.float32)}
    write_gguf(path, more=bias)
    with refused(f"{path}: tensor blk.0.attn_q.bias is surplus"):
        load_model(path)
    write_gguf(path, more={"counts": np.zeros(4, np.int32)})
    with refused(f"{path}: tensor 'counts' is stored as I32, expected one of F32, F16"):
        load_model(path)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_damaged_anywhere(tmp_path, load):
    """Cut at each of many places, a file is refused with its name and size."""
    path = tmp_path / "model.gguf"
    write_gguf(path)
    data = path.read_bytes()
    for size in (*range(0, 400, 13), 2500, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"{path}: .*has {size} bytes"):
            load(path)


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(40), "not GGUF: begins with b'GGML' and has 44 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF of version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF of version 50331648, expected"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors, expected at most"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "keys, expected at most 65536"),
        (HEADER + struct.pack("<I", 99), "k has values of type 99, expected numbers"),
        (HEADER + struct.pack("<IIQ", 9, 9, 1), "k has values of type 9, expected"),
        (HEADER + struct.pack("<IIQ", 9, 8, 1 << 61), "texts of an array, expected"),
        (HEADER + struct.pack("<IIQ", 9, 10, 1 << 61), "truncated: k ends at byte"),
        (HEADER + struct.pack("<IQ", 8, 1 << 62), "truncated: k ends at byte"),
        (HEADER + struct.pack("<IQ", 8, 1) + b"\xff", "k is not UTF-8"),
    ],
)
def test_lying_headers(tmp_path, data, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with refused(f"{path}: ") as caught:
        load_model(path)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model and its tokenizer, each tensor exact in float16 and bfloat16."""
    path = tmp_path_factory.mktemp("source") / "model.gguf"
    tensors = random_tensors("bfloat16", CONFIG)
    tensors = {name: x.astype("f2").astype("f4") for name, x in tensors.items()}
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    write_gguf(path, tensors, **{"tokenizer.chat_template": CHATML_TEMPLATE})
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_round_trip(tmp_path, source, kind):
    model, tokenizer = load_model(source), load_tokenizer(source)
    path = tmp_path / "new" / "our.model.gguf"
    save_gguf(model, tokenizer, path, kind=kind)
    found = load_model(path)
    assert found.config == model.config
    params = named_parameters(found)
    for name, expected in named_parameters(model).items():
        atol = 0.0
        if kind == "Q8_0" and expected.ndim == 2:
            # Half a step, and what the half-precision scale is off at 127 steps.
            atol = float(jnp.abs(expected).max()) / 127 * (0.5 + 127 / 2048)
            assert (params[name] != expected).any()
        np.testing.assert_allclose(params[name], expected, rtol=0, atol=atol)
    again = load_tokenizer(path)
    text = "the cat\n and the hat <|im_end|>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.encode_chat(text).ids == tokenizer.encode_chat(text).ids
    for field in ("bos_id", "eos_ids", "pad_id", "chat_template"):
        assert getattr(again, field) == getattr(tokenizer, field)
    # As the package itself reads it.
    reader = GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.architecture"] == "llama"
    assert values["general.name"] == "our.model"
    assert values["llama.context_length"] == CONFIG["max_position_embeddings"]
    file_type = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}[kind]
    assert values["general.file_type"] == file_type
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == kind
    assert sorted(x.name for x in path.parent.iterdir()) == ["Modelfile", path.name]


def test_rows_that_q8_0_cannot_divide(tmp_path, source):
    write_checkpoint(tmp_path / "model", vocab_size=60)
    model = load_model(tmp_path / "model")
    save_gguf(model, load_tokenizer(source), tmp_path / "q.gguf", kind="Q8_0")
    tensors = read_header(tmp_path / "q.gguf").tensors
    assert tensors["blk.0.ffn_up.weight"].kind == "Q8_0"
    assert tensors["blk.0.ffn_down.weight"].kind == "F16"
    config = load_model(tmp_path / "q.gguf").config
    assert (config.head_dim, config.vocab_size) == (12, 60)


@pytest.mark.parametrize("tied", [False, True])
def test_llama3_round_trip(tmp_path, source, tied):
    changes = {"rope_scaling": dataclasses.asdict(SCALING) | {"factor": 7.3}}
    changes |= {"rope_theta": 500000, "head_dim": 64, "tie_word_embeddings": tied}
    tensors = random_tensors(config=CONFIG | {"head_dim": 64})
    if tied:
        del tensors["lm_head.weight"]
    write_checkpoint(tmp_path / "model", tensors, **CONFIG | changes)
    model = load_model(tmp_path / "model")
    save_gguf(model, load_tokenizer(source), tmp_path / "model.gguf", kind="F32")
    header = read_header(tmp_path / "model.gguf")
    assert ("output.weight" in header.tensors) != tied
    found = load_model(tmp_path / "model.gguf")
    assert found.config == model.config
    same_parameters(found, model)


def test_modelfile(tmp_path, source):
    model, tokenizer = load_model(source), load_tokenizer(source)
    chatml = (
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n"
        '"""\n'
    )
    first, stop = "FROM ./m.gguf\n", 'PARAMETER stop "<|im_end|>"\n'
    default = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\n"
        "Be \"kind\".<|im_end|>\n{{ '' }}{% endif %}"
    )
    for template, expected in (
        (CHATML_TEMPLATE, first + chatml + stop),
        (
            default + CHATML_TEMPLATE,
            first + chatml + 'SYSTEM """Be "kind"."""\n' + stop,
        ),
        ("{{ messages }}", first + stop),
        ("{{ raise_exception('no') }}", first + stop),
        (None, first + stop),
    ):
        tokenizer = dataclasses.replace(tokenizer, chat_template=template)
        save_gguf(model, tokenizer, tmp_path / "m.gguf", kind="BF16")
        assert (tmp_path / "Modelfile").read_text() == expected


def test_save_refuses(tmp_path, source):
    model, tokenizer = load_model(source), load_tokenizer(source)
    other = tmp_path / "notes.gguf"
    other.write_text("mine")
    with refused(f"{other}: not overwritten, it is no GGUF file"):
        save_gguf(model, tokenizer, other)
    with refused(f"{tmp_path / 'm.bin'}: expected a name with .gguf at the end"):
        save_gguf(model, tokenizer, tmp_path / "m.bin")
    with refused("kind must be among F32, F16, BF16, Q8_0; got 'Q4_0'"):
        save_gguf(model, tokenizer, tmp_path / "m.gguf", kind="Q4_0")
    (tmp_path / "Modelfile").write_text("FROM llama3.2\n")
    with refused("Modelfile: not overwritten, it is not that of m.gguf"):
        save_gguf(model, tokenizer, tmp_path / "m.gguf")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["Modelfile", "notes.gguf"]


def test_failure_leaves_the_file_before(tmp_path, source, monkeypatch):
    model, tokenizer = load_model(source), load_tokenizer(source)
    path = tmp_path / "m.gguf"
    save_gguf(model, tokenizer, path, kind="F16")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_padding", full)
    with pytest.raises(OSError, match="No space left"):
        save_gguf(model, tokenizer, path, kind="Q8_0")
    assert path.read_bytes() == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["Modelfile", "m.gguf"]


def test_command(tmp_path, source, capsys):
    """From GGUF to a directory and back."""
    directory, back = tmp_path / "directory", tmp_path / "back.gguf"
    main([f"--model={source}", f"--output={directory}"])
    main([f"--model={directory}", "--to=gguf", "--dtype=float16", f"--output={back}"])
    assert capsys.readouterr().out == f"{directory}\n{back}\n"
    for path in (directory, back):
        same_parameters(load_model(path), load_model(source))
        assert load_tokenizer(path).eos_ids == (2,)
    with pytest.raises(SystemExit) as caught:
        main([f"--model={source}", "--dtype=q8_0", f"--output={tmp_path / 'other'}"])
    expected = "dtype must be among float32, bfloat16, float16; got 'q8_0'"
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"convert: {expected}\n"


def test_token_ids_are_carried_over(tmp_path):
    changes = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.bos_token_id": 5}
    write_gguf(tmp_path / "model.gguf", **changes)
    model = load_model(tmp_path / "model.gguf")
    save_hugging_face(model, tmp_path / "model", source=tmp_path / "model.gguf")
    config = (tmp_path / "model" / "config.json").read_text()
    assert re.search(r'"bos_token_id": 5,\s+"eos_token_id": \[\s+2,\s+0\s+\]', config)


@pytest.fixture(scope="module")
def smollm2():
    try:
        return smollm2_path()
    except ValueError as error:
        pytest.skip(str(error))


def test_smollm2(smollm2):
    """The real one: its shape and tokens. Its answers are compared by `make parity`."""
    config = from_gguf(read_header(smollm2))
    assert config.num_hidden_layers == 30 and config.tie_word_embeddings
    tokenizer = load_tokenizer(smollm2, config.vocab_size)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, (2,))
    # The ids of the original tokenizer, which cuts numbers into digits.
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("  multiple   spaces") == [216, 2701, 256, 5600]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named")
    assert tokenizer.encode_chat(text).ids[:2] == [1, 9690]
