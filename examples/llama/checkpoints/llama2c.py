"""Load llama2.c checkpoints."""

import math
import os
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from examples.llama.checkpoints.tensors import is_kernel
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama
from examples.llama.model.parameters import Sharding, build


def load_llama2c(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    sharding: Sharding | None = None,
) -> Llama:
    """Loads a llama2.c checkpoint, "version 0": seven int32, then float32 tensors.

    Args:
      path: The file.
      dtype: The model's compute dtype.
      param_dtype: The dtype that the weights are cast to.
      sharding: See `loading.load_model`.

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

    def read(parameter: str, index: tuple[slice, ...]) -> np.ndarray:
        if parameter.startswith("layers."):
            _, layer, parameter = parameter.split(".", 2)
            weight = weights[names[parameter]][int(layer)]
        else:
            weight = weights[names[parameter]]
        if names[parameter] in ("wq", "wk"):
            # Rows 2i and 2i + 1 of a head, a rotary pair, become i and i + D / 2.
            pairs = weight.reshape(-1, config.head_size // 2, 2, config.hidden_size)
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        return (weight.T if is_kernel(parameter) else weight)[index]

    return build(config, read, dtype, param_dtype, sharding)


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

    kv_dim = kv_heads * config.head_size
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
        "rope_cos": (context, config.head_size // 2),
        "rope_sin": (context, config.head_size // 2),
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
        b"24ka": "llama2.c's version 1 or 2",
        b"{": "JSON",
    }
    if header[8:9] == b"{":
        return ", it looks like safetensors"
    for magic, name in known.items():
        if header.startswith(magic):
            return f", it looks like {name}"
    return ""
