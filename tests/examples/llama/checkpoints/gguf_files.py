"""Small GGUF files of Llamas, written by the gguf package's own writer."""

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize

from tests.examples.llama.checkpoints import huggingface_files

# Wide enough for superblocks of 256.
CONFIG = huggingface_files.CONFIG | {
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_hidden_layers": 1,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}
# Bytes of a block, where in it the half-precision scales are, and what they multiply.
SUPERBLOCKS = {
    "Q2_K": (84, (80, 82), 15 * 3),
    "Q3_K": (110, (108,), 32 * 4),
    "Q4_K": (144, (0, 2), 63 * 15),
    "Q5_K": (176, (0, 2), 63 * 31),
    "Q6_K": (210, (208,), 128 * 32),
}

# SentencePiece's, the one that merges first at the front.
PIECES = ["▁", "t", "h", "e", "a", "▁t", "he", "▁the", "aa", "aaa", "▁▁", "▁▁▁", "é"]


def gguf_name(name):
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def model_metadata(config=CONFIG):
    return {
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": 10000.0,
    }


def vocabulary_metadata(size=CONFIG["vocab_size"]):
    """A byte-level tokenizer of a few tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*special, *letters, "Ġ", "Ċ", "Ġa", "th", "the"]
    types = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3)
    while len(tokens) < size:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(TokenType.UNUSED)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(x) for x in types],
        "tokenizer.ggml.merges": ["Ġ a", "t h", "th e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


def sentencepiece_metadata(pieces=PIECES, scores=None):
    """As llama.cpp's converter writes it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
    types += [TokenType.NORMAL] * len(pieces) + [TokenType.USER_DEFINED]
    if scores is None:
        scores = [-float(i) for i in range(len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *pieces, "<|user|>"],
        "tokenizer.ggml.token_type": [int(x) for x in types],
        "tokenizer.ggml.scores": [0.0] * 259 + [*scores, -1000.0],
        # Its defaults are 1, 2 and to add bos.
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.eos_token_id": None,
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
    }


def permuted(weight, head_dim):
    """As llama.cpp's converter has queries and keys, [out, in]."""
    heads = weight.shape[0] // head_dim
    pairs = weight.reshape(heads, 2, head_dim // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def stored_rows(weight, kind, rng):
    """Bytes [rows, bytes] of a kind, and the numbers that they stand for."""
    number = GGMLQuantizationType[kind]
    if kind in SUPERBLOCKS:  # the package cannot quantize to these
        size, scales, largest = SUPERBLOCKS[kind]
        shape = (weight.shape[0], weight.shape[1] // 256, size)
        raw = rng.integers(256, size=shape, dtype=np.uint8)
        for place in scales:
            scale = rng.uniform(0.2, 0.4, size=shape[:2]) / largest
            scale = scale.astype("<f2")
            raw[..., place : place + 2] = scale[..., None].view(np.uint8)
        raw = raw.reshape(weight.shape[0], -1)
    else:
        raw = quantize(weight, number).view(np.uint8)
    return raw, dequantize(raw, number)


def write_gguf(path, tensors=None, *, kind="F32", config=CONFIG, more=(), **changes):
    """A file of `tensors` by Hugging Face's names, by default random ones.

    Args:
      kind: Of the matrices.
      more: Further tensors, by GGUF's names.
      changes: Of the metadata; dots in a key are double underscores, None removes one.

    Returns:
      What the tensors of the file stand for, by Hugging Face's names.
    """
    rng = np.random.default_rng(1)
    tensors = (
        huggingface_files.random_tensors(config=config) if tensors is None else tensors
    )
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    writer = GGUFWriter(path, changes.pop("general.architecture", "llama"))
    metadata = model_metadata(config) | vocabulary_metadata(config["vocab_size"])
    for key, value in (metadata | changes).items():
        if value is not None:
            add = {
                str: writer.add_string,
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                list: writer.add_array,
            }[type(value)]
            add(key, value)
    found = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            found[name] = tensor
            writer.add_tensor(gguf_name(name), tensor)
            continue
        raw, found[name] = stored_rows(tensor, kind, rng)
        if "q_proj" in name or "k_proj" in name:
            raw = permuted(raw, config["head_dim"])
        writer.add_tensor(gguf_name(name), raw, raw_dtype=GGMLQuantizationType[kind])
    for name, tensor in dict(more).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def write_vocabulary(path, metadata):
    """A file whose model has as many tokens as its tokenizer."""
    size = len(metadata["tokenizer.ggml.tokens"])
    write_gguf(path, config=CONFIG | {"vocab_size": size}, **metadata)
    return path
