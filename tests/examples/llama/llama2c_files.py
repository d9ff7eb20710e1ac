"""Small llama2.c checkpoints for the tests, written as its export does."""

import re
import struct

import numpy as np
import pytest

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


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))
