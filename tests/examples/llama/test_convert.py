"""llama2.c's files and our own directories: what is read, and what is refused."""

import itertools
import json
import math
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from examples.llama import convert
from examples.llama.convert import (
    load_llama2c,
    load_llama2c_tokenizer,
    load_model,
    save_model,
)

HEADER = {
    "dim": 32,
    "hidden_dim": 40,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 50,
    "seq_len": 24,
}


def tensor_shapes(header):
    """llama2.c's tensors in the order of its file."""
    dim, hidden, layers, heads, kv_heads, vocab, context = header
    head_dim = dim // heads
    shapes = {
        "token_embedding": (abs(vocab), dim),
        "attention_norm": (layers, dim),
        "wq": (layers, heads * head_dim, dim),
        "wk": (layers, kv_heads * head_dim, dim),
        "wv": (layers, kv_heads * head_dim, dim),
        "wo": (layers, dim, heads * head_dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "final_norm": (dim,),
        "rope_cos": (context, head_dim // 2),
        "rope_sin": (context, head_dim // 2),
    }
    return shapes | ({"wcls": (-vocab, dim)} if vocab < 0 else {})


def write_llama2c(path, **changes):
    """A checkpoint of random weights; the RoPE tables are NaN, for none may be used."""
    header = list((HEADER | changes).values())
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<7i", *header))
        for name, shape in tensor_shapes(header).items():
            weight = rng.normal(scale=0.2, size=shape) + ("norm" in name)
            weight = np.full(shape, np.nan) if "rope" in name else weight
            file.write(weight.astype("<f4").tobytes())
    return path


def reference_logits(path, tokens):
    """llama2.c's forward pass in float64, written from its description.

    tokens: int [T]. Returns [T, vocab_size].
    """
    data = path.read_bytes()
    header = struct.unpack("<7i", data[:28])
    dim, _, layers, heads, kv_heads, vocab, _ = header
    weights, offset = {}, 28
    for name, shape in tensor_shapes(header).items():
        flat = np.frombuffer(data, "<f4", math.prod(shape), offset)
        weights[name] = flat.reshape(shape).astype(np.float64)
        offset += flat.nbytes
    assert offset == len(data)
    head_dim, time = dim // heads, len(tokens)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale

    def rotate(x):  # [T, heads, D], neighbours 2i and 2i + 1 are a pair
        frequency = 10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
        turn = np.exp(1j * np.arange(time)[:, None, None] * frequency)
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)

    x = weights["token_embedding"][tokens]
    for i in range(layers):
        w = {name: weight[i] for name, weight in weights.items() if weight.ndim == 3}
        y = norm(x, weights["attention_norm"][i])
        q = rotate((y @ w["wq"].T).reshape(time, heads, head_dim))
        k = rotate((y @ w["wk"].T).reshape(time, kv_heads, head_dim))
        v = (y @ w["wv"].T).reshape(time, kv_heads, head_dim)
        out = np.zeros((time, heads, head_dim))
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, shared].T / np.sqrt(head_dim)
            scores[np.triu_indices(time, 1)] = -np.inf
            weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weight /= weight.sum(axis=-1, keepdims=True)
            out[:, head] = weight @ v[:, shared]
        x = x + out.reshape(time, dim) @ w["wo"].T
        y = norm(x, weights["ffn_norm"][i])
        gate = y @ w["w1"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"].T)) @ w["w2"].T
    head = weights["wcls"] if vocab < 0 else weights["token_embedding"]
    return norm(x, weights["final_norm"]) @ head.T


@nnx.jit
def run(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("vocab_size", [50, -50])
def test_forward_agrees_with_reference(tmp_path, vocab_size):
    path = write_llama2c(tmp_path / "model.bin", vocab_size=vocab_size)
    model = load_llama2c(path)
    assert model.config.tie_word_embeddings == (vocab_size > 0)
    assert model.config.max_position_embeddings == 24
    tokens = np.random.default_rng(1).integers(50, size=24, dtype=np.int32)
    logits = run(model, tokens[None])[0]
    np.testing.assert_allclose(logits, reference_logits(path, tokens), atol=1e-4)


def test_real_model_agrees_with_reference(data_dir, stories_model, stories_tokenizer):
    text = (data_dir / "tinystories_excerpt.txt").read_text()[:1500]
    tokens = np.array([1, *stories_tokenizer.encode(text).ids][:300], np.int32)
    assert len(tokens) == 300
    expected = reference_logits(data_dir / "stories260K.bin", tokens)
    logits = run(stories_model, tokens[None])[0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_real_model_predicts_stories(data_dir, stories_model, stories_tokenizer):
    text = (data_dir / "tinystories_excerpt.txt").read_text()
    ids = stories_tokenizer.encode(text).ids
    count = len(ids) // 256
    windows = np.array(ids[: count * 256], np.int32).reshape(count, 256)[::8]

    @nnx.jit
    def loss(model, tokens):
        logits = jax.nn.log_softmax(model(tokens[:, :-1]))
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)
        return -jnp.mean(picked)

    # Documented are 1.30 for whole stories after <s>; the excerpt does not mark them.
    assert 1.6 < loss(stories_model, windows) < 2.1


def test_dtypes(tmp_path):
    path = write_llama2c(tmp_path / "model.bin")
    exact = nnx.state(load_llama2c(path))
    model = load_llama2c(path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    for leaf, like in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(exact), strict=True
    ):
        np.testing.assert_array_equal(leaf, np.asarray(like).astype(jnp.bfloat16))


# What is refused


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize("load", [load_llama2c, load_llama2c_tokenizer, load_model])
def test_missing_file(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=r"absent\.bin"):
        load(tmp_path / "absent.bin")


@pytest.mark.parametrize("field", HEADER)
def test_nonsense_header(tmp_path, field):
    for value in (0, 1 << 28) if field == "vocab_size" else (0, -4, 1 << 28):
        header = list((HEADER | {field: value}).values())
        path = tmp_path / "model.bin"
        path.write_bytes(struct.pack("<7i", *header) + bytes(100))
        with refused(f"{path}: header field {field} is {value}, expected 1 to 1048576"):
            load_llama2c(path)


def test_header_that_is_no_llama(tmp_path):
    path = write_llama2c(tmp_path / "model.bin")
    path.write_bytes(struct.pack("<7i", 32, 40, 2, 4, 3, 50, 24) + bytes(100000))
    message = "header: num_key_value_heads must divide num_attention_heads (4), got 3"
    with refused(f"{path}: {message}"):
        load_llama2c(path)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"PK\x03\x04" + bytes(100), "a zip archive, as torch.save writes"),
        (pickle.dumps(list(range(100)), protocol=4), "a pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
        (struct.pack("<Ii", 0x616B3432, 1) + bytes(100), "llama2.c's version 1 or 2"),
        (json.dumps({"architectures": ["LlamaForCausalLM"]}).encode(), "JSON"),
        (struct.pack("<Q", 90) + b'{"__metadata__":{}}' + bytes(100), "safetensors"),
    ],
)
def test_other_formats(tmp_path, data, name):
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with refused(f"not a llama2.c file of version 0, it looks like {name}"):
        load_model(path)


def test_short_header(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(27))
    with refused(f"{path}: header has 27 bytes, expected 28 or more"):
        load_llama2c(path)


@pytest.mark.parametrize("tensor", tensor_shapes((*list(HEADER.values())[:5], -50, 24)))
def test_truncated_in_each_tensor(tmp_path, tensor):
    path = write_llama2c(tmp_path / "model.bin", vocab_size=-50)
    shapes = tensor_shapes((*list(HEADER.values())[:5], -50, 24))
    names = list(shapes)
    end = 28 + 4 * sum(
        math.prod(shapes[name]) for name in names[: names.index(tensor) + 1]
    )
    path.write_bytes(path.read_bytes()[: end - 1])
    message = (
        f"{end - 1} bytes, but tensor {tensor} {shapes[tensor]} ends at byte {end}"
    )
    with refused(f"{path}: truncated: {message}"):
        load_llama2c(path)


def test_surplus_bytes(tmp_path):
    path = write_llama2c(tmp_path / "model.bin")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(3))
    with refused(f"{path}: {size + 3} bytes, expected {size} by the header"):
        load_llama2c(path)
    with refused("3 bytes after tensor rope_sin"):
        load_llama2c(path)


# Our own directories


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

            patch.setattr(convert.ocp.StandardCheckpointer, "save", kill)
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
    code = "import sys, examples.llama.convert as c; c.load_model(sys.argv[1])"
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


# The tokenizer

BASE = ["\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = [
    " t",
    "he",
    " the",
    "\n\n",
    "aa",
    "aaa",
    "ba",
    "aba",
    " <",
    "s>",
    "<s",
    "é",
    "<",
]
LETTERS = [*" abcdehst\n>", "▁"]


def write_tokenizer(path, pieces, scores=None, longest=None):
    entries = [piece.encode() for piece in pieces]
    if scores is None:
        scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    longest = max(map(len, entries)) if longest is None else longest
    with path.open("wb") as file:
        file.write(struct.pack("<i", longest))
        for score, piece in zip(scores, entries, strict=False):
            file.write(struct.pack("<fi", score, len(piece)) + piece)
    return path


def read_tokenizer(path):
    data, offset, pieces, scores = path.read_bytes(), 4, [], []
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        pieces.append(data[offset + 8 : offset + 8 + length].decode())
        scores.append(score)
        offset += 8 + length
    return pieces, scores


def reference_encode(pieces, scores, text):
    """llama2.c's algorithm, as shared/data/README.md describes it."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    if not text:
        return []
    tokens = []
    for character in " " + text:
        fallback = [byte + 3 for byte in character.encode()]
        tokens += [ids[character]] if character in ids else fallback
    while True:
        best = -math.inf
        for i, (left, right) in enumerate(itertools.pairwise(tokens)):
            merged = ids.get(pieces[left] + pieces[right])
            if merged is not None and scores[merged] > best:
                best, place, token = scores[merged], i, merged
        if best == -math.inf:
            return tokens
        tokens[place : place + 2] = [token]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tok.bin"
    write_tokenizer(path, ["<unk>", *BASE, *WORDS, *LETTERS])
    return load_llama2c_tokenizer(path), *read_tokenizer(path)


PARTS = [*" abhest<>/\n0x▁é🙂\0", "<s>", "</s>", "<0x0A>", "the", " and", "aaa"]
tricky = st.text() | st.lists(st.sampled_from(PARTS), max_size=30).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=tricky)
def test_tokenizer_small(small, text):
    tokenizer, pieces, scores = small
    ids = tokenizer.encode(text).ids
    assert ids == reference_encode(pieces, scores, text)
    assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=150)
@given(text=tricky)
def test_tokenizer_real(data_dir, stories_tokenizer, text):
    ids = stories_tokenizer.encode(text).ids
    assert ids == reference_encode(*read_tokenizer(data_dir / "tok512.bin"), text)
    assert stories_tokenizer.decode(ids) == text


def test_tokenizer_real_texts(data_dir, stories_tokenizer):
    pieces, scores = read_tokenizer(data_dir / "tok512.bin")
    lines = (data_dir / "gsm8k_test.jsonl").read_text().splitlines()[:150]
    records = [json.loads(line) for line in lines]
    stories = (data_dir / "tinystories_excerpt.txt").read_text()
    texts = [record[field] for record in records for field in ("question", "answer")]
    texts += [stories[i * 300 : i * 300 + 300] for i in range(150)]
    for text in texts:
        ids = stories_tokenizer.encode(text).ids
        assert ids == reference_encode(pieces, scores, text)
        assert stories_tokenizer.decode(ids) == text


def test_tokenizer_any_vocabulary(tmp_path):
    """Merged tokens with several splits, and runs of one letter, agree as well."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        letters = "abc"[: rng.integers(1, 4)]
        words = {"".join(rng.choice(list(letters), rng.integers(2, 7)))
                 for _ in range(rng.integers(2, 25))}  # fmt: skip
        words = list(rng.permutation(sorted(words)))
        pieces = ["<unk>", *BASE, *words, *letters, " "]
        path = write_tokenizer(tmp_path / "tok.bin", pieces)
        tokenizer = load_llama2c_tokenizer(path)
        for _ in range(10):
            text = "".join(rng.choice(list(letters), rng.integers(3, 30)))
            expected = reference_encode(*read_tokenizer(path), text)
            assert tokenizer.encode(text).ids == expected


@pytest.mark.parametrize("text", ["<s>", "</s> <s>x", "<unk>", "\n<s>\n", "<0x0A>"])
def test_no_text_is_a_special_token(small, text):
    copies = pickle.loads(pickle.dumps(small[0])), Tokenizer.from_str(small[0].to_str())
    for tokenizer in (small[0], *copies):
        ids = tokenizer.encode(text).ids
        assert min(ids) >= 3
        assert tokenizer.decode([1, *ids, 2, 1, 0]) == text
        assert [tokenizer.id_to_token(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]


def test_tokenizer_size(tmp_path):
    path = write_tokenizer(tmp_path / "tok.bin", ["<unk>", *BASE, "a"])
    assert load_llama2c_tokenizer(path, vocab_size=260).get_vocab_size() == 260
    with refused(f"{path}: 260 tokens, expected the model's vocab_size, 512"):
        load_llama2c_tokenizer(path, vocab_size=512)


@pytest.mark.parametrize(
    ("pieces", "scores", "longest", "message"),
    [
        ([*BASE, "a"], None, None, "token 3 is '<0x01>', expected '<0x00>'"),
        (["<unk>", *BASE[:100]], None, None, "token 101 is missing, expected '<0x62>'"),
        (["<unk>", *BASE, "ab", "ab"], None, None, "token 'ab' occurs twice"),
        (
            ["<unk>", *BASE, "ab", "ba", "a", "b"],
            [0.0] * 261 + [-1.0, -2.0],
            None,
            "tokens 'ba' and 'ab' have the same score, 0.0; expected distinct scores",
        ),
        (
            ["<unk>", *BASE, "abcdefghij"],
            None,
            6,
            "token 259 at byte 3628 has length 10 and score -0.0, expected 0 to 6 and "
            "a number: not a llama2.c tokenizer",
        ),
        (
            ["<unk>", *BASE, "a"],
            [0.0] * 259 + [math.nan],
            None,
            "has length 1 and score nan",
        ),
    ],
)
def test_tokenizer_refused(tmp_path, pieces, scores, longest, message):
    path = write_tokenizer(tmp_path / "tok.bin", pieces, scores, longest)
    with refused(message):
        load_llama2c_tokenizer(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x07", "1 bytes, expected 4 or more"),
        (bytes(8), "longest token length is 0, expected 1 to 65536: not a llama2.c"),
        (b"\x07\0\0\0", "token 3 is missing, expected '<0x00>'"),
        (b"\x07\0\0\0\0\0\0\0\x05", "token 0 at byte 4 is truncated, the file has 9"),
        (struct.pack("<ifi", 7, 0.0, 5) + b"<un", "token 0 at byte 4 is truncated"),
        (struct.pack("<ifi", 7, 0.0, -1) + b"<unk>", "token 0 at byte 4 has length -1"),
        (struct.pack("<ifi", 7, 0.0, 1) + b"\xff", "token 0 at byte 4 is not UTF-8"),
        (b'{"version": "1.0", "model": {}}', "longest token length is 1702240891"),
    ],
)
def test_tokenizer_damaged(tmp_path, data, message):
    path = tmp_path / "tok.bin"
    path.write_bytes(data)
    with refused(f"{path}: {message}"):
        load_llama2c_tokenizer(path)
