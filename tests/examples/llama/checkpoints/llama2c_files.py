"""Small llama2.c checkpoints and tokenizers, written as its export does."""

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

# The tokens after <unk> that every tokenizer begins with.
BASE = ["\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]


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


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))
