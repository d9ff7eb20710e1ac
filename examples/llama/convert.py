"""Read a Llama and its tokenizer from llama2.c's files; save and load our own.

Whatever the source, the result is one `Llama`, with Hugging Face's parameter names
and rotary convention. Nothing here unpickles.
"""

import dataclasses
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike
from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from examples.llama.model import Llama, LlamaConfig

UNKNOWN, START, END = 0, 1, 2  # the ids of <unk>, <s> and </s>
_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_FIRST_PIECE = len(_SPECIAL) + len(_BYTES)


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> Llama:
    """Loads a model from a llama2.c file or from a directory of `save_model`.

    Saved parameters come back bit for bit where `param_dtype` is the dtype they were
    saved in, and are cast otherwise.

    Args:
      path: The file or directory.
      dtype: The model's compute dtype.
      param_dtype: The dtype of the parameters.

    Raises:
      FileNotFoundError: Nothing is at `path`.
      ValueError: What is there is something else, or is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        return load_llama2c(path, dtype=dtype, param_dtype=param_dtype)
    for name in ("config.json", "params"):
        if not (path / name).exists():
            raise ValueError(f"{path}: not a model of save_model, it has no {name}")
    try:
        config = LlamaConfig.from_dict(json.loads((path / "config.json").read_text()))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    graph, state = _abstract(config, dtype, param_dtype)
    # Named, because the devices that it was saved from need not exist here.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        nnx.to_pure_dict(state),
    )
    params = path.absolute() / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(params).item_metadata
        if stored is None:
            raise ValueError(f"{params}: damaged, or not a checkpoint of Orbax")
        found = {leaf.name: leaf.shape for leaf in jax.tree.leaves(stored.tree)}
        expected = {_name(at): x.shape for at, x in jax.tree.leaves_with_path(target)}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"{params}: shape of {name} is {found.get(name)}, expected "
                    f"{expected.get(name)} by config.json"
                )
        try:
            weights = checkpointer.restore(params, target)
        except Exception as error:  # of no closer type, and thousands of characters
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{params}: cannot be read: {reason} ...") from error
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)


def save_model(model: Llama, directory: str | os.PathLike[str]) -> None:
    """Writes config.json and the parameters for `load_model`, from one process.

    All of it is written beside `directory` and renamed at the end. A process killed on
    the way leaves the model that was there before, or, if it dies between the two
    renames, has it under the name ``.{directory}.previous``.

    Raises:
      ValueError: `directory` holds something other than a model saved here.
    """
    directory = Path(directory).resolve()
    staging = directory.with_name(f".{directory.name}.saving")
    previous = directory.with_name(f".{directory.name}.previous")
    if directory.exists():
        found = {p.name for p in directory.iterdir()} if directory.is_dir() else None
        if found not in (set(), {"config.json", "params"}):
            raise ValueError(
                f"{directory}: not overwritten, it is neither an empty directory nor "
                "one with config.json and params alone"
            )
    shutil.rmtree(staging, ignore_errors=True)  # of a process killed on the way
    staging.mkdir(parents=True)
    config = json.dumps(dataclasses.asdict(model.config), indent=2)
    (staging / "config.json").write_text(config + "\n")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(staging / "params", params)
    if directory.exists():
        shutil.rmtree(previous, ignore_errors=True)
        directory.rename(previous)
    staging.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)


def load_llama2c(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> Llama:
    """Loads a llama2.c checkpoint, "version 0": seven int32, then float32 tensors.

    Args:
      path: The file.
      dtype: The model's compute dtype.
      param_dtype: The dtype that the weights are converted to.

    Raises:
      FileNotFoundError: Nothing is at `path`.
      ValueError: The header makes no sense, or the file is shorter or longer than the
        header says.
    """
    config, weights = _read_llama2c(Path(path))
    names = {
        "embed_tokens.embedding": "token_embedding",
        "input_layernorm.scale": "attention_norm",
        "self_attn.q_proj.kernel": "wq",
        "self_attn.k_proj.kernel": "wk",
        "self_attn.v_proj.kernel": "wv",
        "self_attn.o_proj.kernel": "wo",
        "post_attention_layernorm.scale": "ffn_norm",
        "mlp.gate_proj.kernel": "w1",
        "mlp.down_proj.kernel": "w2",
        "mlp.up_proj.kernel": "w3",
        "norm.scale": "final_norm",
        "lm_head.kernel": "wcls",
    }

    def read(parameter: str) -> np.ndarray:
        if parameter.startswith("layers."):
            _, layer, parameter = parameter.split(".", 2)
            weight = weights[names[parameter]][int(layer)]
        else:
            weight = weights[names[parameter]]
        if names[parameter] in ("wq", "wk"):
            # Rows 2i and 2i + 1 of a head, a rotary pair, become i and i + D / 2.
            pairs = weight.reshape(-1, config.head_dim // 2, 2, config.hidden_size)
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        return weight.T if parameter.endswith(".kernel") else weight

    return _build(config, read, dtype, param_dtype)


def load_llama2c_tokenizer(
    path: str | os.PathLike[str], vocab_size: int | None = None
) -> Tokenizer:
    """Loads a llama2.c tokenizer file as a tokenizer that gives the same ids.

    ``encode(text).ids`` has no ``<s>`` in front, and text that reads ``<s>`` stays
    text: only the caller adds special tokens, by id, so no text can smuggle one in.
    ``decode(ids)`` leaves them out, and undoes `encode`.

    Args:
      path: The file.
      vocab_size: The number of tokens that it must have, where that is known.

    Raises:
      FileNotFoundError: Nothing is at `path`.
      ValueError: The file is not such a tokenizer, is damaged, or has another number
        of tokens.
    """
    pieces, scores = _read_llama2c_tokenizer(Path(path), vocab_size)
    # Of all adjacent pairs, the one whose merged token scores highest goes first; only
    # ordinary tokens take part. Equal scores would be a tie between the pairs of two
    # tokens, which llama2.c gives to the pair further left, and merge ranks cannot.
    ordinary = set(pieces[_FIRST_PIECE:])
    merges: list[tuple[str, str]] = []
    merged: dict[float, str] = {}
    for score, piece in sorted(
        zip(scores[_FIRST_PIECE:], pieces[_FIRST_PIECE:], strict=True), reverse=True
    ):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [split for split in splits if ordinary.issuperset(split)]
        if splits and merged.setdefault(score, piece) != piece:
            raise ValueError(
                f"{path}: tokens {merged[score]!r} and {piece!r} have the same score, "
                f"{score}; expected distinct scores"
            )
        merges += splits

    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token=pieces[UNKNOWN],
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Prepend(" ")
    # Special tokens are dropped here, and not registered as special: the library would
    # then find them in any text, but for a flag that pickle and JSON forget.
    special = Regex(rf"\A(?:{'|'.join(_SPECIAL)})\z")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(special, ""),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _abstract(
    config: LlamaConfig, dtype: DTypeLike, param_dtype: DTypeLike
) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's graph and its parameters' shapes and dtypes, nothing allocated."""

    def create() -> Llama:
        return Llama(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)

    return nnx.split(nnx.eval_shape(create))


def _name(path: tuple[jax.tree_util.DictKey, ...]) -> str:
    return ".".join(str(part.key) for part in path)


def _build(
    config: LlamaConfig,
    read: Callable[[str], np.ndarray],
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> Llama:
    """A model whose parameter at "layers.0.mlp.up_proj.kernel" is `read` of that."""
    graph, state = _abstract(config, dtype, param_dtype)

    def load(
        path: tuple[jax.tree_util.DictKey, ...], like: jax.ShapeDtypeStruct
    ) -> jax.Array:
        # A copy, so that nothing depends on the file from here on.
        array = jnp.array(read(_name(path)), like.dtype)
        assert array.shape == like.shape
        return array

    params = jax.tree.map_with_path(load, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def _read_llama2c(path: Path) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    """The configuration, and the tensors as read-only views of the mapped file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(28)
    if len(header) < 28:
        raise ValueError(f"{path}: header has {size} bytes, expected 28 or more")
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", header)
    fields = {
        "dim": dim,
        "hidden_dim": hidden,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "vocab_size": abs(vocab),  # negative: the output head is not the embedding
        "seq_len": context,
    }
    for name, value in fields.items():
        if not 1 <= value <= 1 << 20:
            raise ValueError(
                f"{path}: header field {name} is {value}, expected 1 to {1 << 20}: not "
                f"a llama2.c file of version 0{_other_format(header)}"
            )
    try:
        config = LlamaConfig(
            vocab_size=abs(vocab),
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context,
            tie_word_embeddings=vocab > 0,
        )
    except ValueError as error:
        raise ValueError(f"{path}: header: {error}") from None

    kv_dim = kv_heads * config.head_dim
    shapes = {
        "token_embedding": (abs(vocab), dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_dim, dim),
        "wv": (layers, kv_dim, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "final_norm": (dim,),
        "rope_cos": (context, config.head_dim // 2),
        "rope_sin": (context, config.head_dim // 2),
    }
    if vocab < 0:
        shapes["wcls"] = (-vocab, dim)
    end = len(header)
    for name, shape in shapes.items():
        end += 4 * math.prod(shape)
        if end > size:
            raise ValueError(
                f"{path}: truncated: {size} bytes, but tensor {name} {shape} ends at "
                f"byte {end} by the header {fields}"
            )
    if end < size:
        raise ValueError(
            f"{path}: {size} bytes, expected {end} by the header {fields}: "
            f"{size - end} bytes after tensor {name}"
        )
    flat = np.memmap(path, "<f4", "r", offset=len(header))
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    tensors = np.split(flat, ends[:-1])
    return config, {
        name: tensor.reshape(shape)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True)
    }


def _other_format(header: bytes) -> str:
    known = {
        b"PK": "a zip archive, as torch.save writes",
        b"\x80": "a pickle",
        b"GGUF": "GGUF",
        b"24ka": "llama2.c's version 1 or 2",
        b"{": "JSON",
    }
    if header[8:9] == b"{":
        return ", it looks like safetensors"
    for magic, name in known.items():
        if header.startswith(magic):
            return f", it looks like {name}"
    return ""


def _read_llama2c_tokenizer(
    path: Path, vocab_size: int | None
) -> tuple[list[str], list[float]]:
    """The tokens, special ones by their usual names, and their scores."""
    data = path.read_bytes()
    if len(data) < 4:
        raise ValueError(f"{path}: {len(data)} bytes, expected 4 or more")
    (longest,) = struct.unpack_from("<i", data)
    if not 1 <= longest <= 1 << 16:
        raise ValueError(
            f"{path}: longest token length is {longest}, expected 1 to {1 << 16}: not "
            "a llama2.c tokenizer"
        )
    pieces: list[str] = []
    scores: list[float] = []
    offset = 4
    while offset < len(data):
        token = f"{path}: token {len(pieces)} at byte {offset}"
        if offset + 8 > len(data):
            raise ValueError(f"{token} is truncated, the file has {len(data)} bytes")
        score, length = struct.unpack_from("<fi", data, offset)
        if not (0 <= length <= longest and math.isfinite(score)):
            raise ValueError(
                f"{token} has length {length} and score {score}, expected 0 to "
                f"{longest} and a number: not a llama2.c tokenizer"
            )
        offset += 8 + length
        if offset > len(data):
            raise ValueError(f"{token} is truncated, the file has {len(data)} bytes")
        try:
            pieces.append(data[offset - length : offset].decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{token} is not UTF-8: {error}") from None
        scores.append(score)
    if vocab_size is not None and len(pieces) != vocab_size:
        raise ValueError(
            f"{path}: {len(pieces)} tokens, expected the model's vocab_size, "
            f"{vocab_size}"
        )
    pieces[: len(_SPECIAL)] = _SPECIAL  # llama2.c has line breaks around <s>
    expected = [*_SPECIAL, *_BYTES]
    for i, piece in enumerate(expected):
        if i >= len(pieces) or pieces[i] != piece:
            found = repr(pieces[i]) if i < len(pieces) else "missing"
            raise ValueError(f"{path}: token {i} is {found}, expected {piece!r}")
    if len(set(pieces)) < len(pieces):
        twice = next(piece for piece in pieces if pieces.count(piece) > 1)
        raise ValueError(f"{path}: token {twice!r} occurs twice")
    return pieces, scores
