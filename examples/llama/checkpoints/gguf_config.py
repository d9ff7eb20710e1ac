"""GGUF's metadata and tensor names of a Llama, to and from ours."""

import dataclasses
from typing import Any

import numpy as np

from examples.gguf_files import Header, read_rows
from examples.llama.model.architectures import LlamaConfig, RopeScaling
from examples.llama.model.llama import rope_frequencies
from examples.llama.text.gguf_tokenizer import END_KEYS

ARCHITECTURE = "llama"
# Where each field of LlamaConfig is, after "llama.".
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
# All of these are the head's size in a Llama.
HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
# What any other value would mean is not in `Llama`.
SUPPORTED = {
    "expert_count": 0,
    "attention.scale": 0.0,
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
}
ROPE_FACTORS = "rope_freqs.weight"
ORIGINAL_CONTEXT = "rope.scaling.original_context_length"
_MODULES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensor_name(parameter: str) -> str:
    """GGUF's name of our "layers.0.mlp.up_proj.kernel", say."""
    module = parameter.rpartition(".")[0]
    if not module.startswith("layers."):
        return f"{_MODULES[module]}.weight"
    _, layer, module = module.split(".", 2)
    return f"blk.{layer}.{_MODULES[module]}.weight"


def is_rotated(parameter: str) -> bool:
    """Whether GGUF has a kernel's rows in the order of `pairs_beside`."""
    return parameter.endswith(("q_proj.kernel", "k_proj.kernel"))


def pairs_beside(rows: int, head_size: int) -> np.ndarray:
    """Which of our rows of a query or key kernel is each row of GGUF.

    A rotary pair is rows i and i + head_size / 2 of a head in ours, rows 2i and 2i + 1
    in GGUF.
    """
    return np.arange(rows).reshape(-1, 2, head_size // 2).swapaxes(1, 2).reshape(-1)


def from_gguf(header: Header) -> LlamaConfig:
    """The configuration that a file's metadata describes.

    Raises:
      ValueError: It is no Llama, has a feature that `Llama` lacks, or a value that is
        missing or out of range.
    """
    found = header.get("general.architecture", str)
    if found != ARCHITECTURE:
        raise ValueError(
            f"{header.path}: general.architecture must be {ARCHITECTURE!r}, got "
            f"{found!r}"
        )
    for key, only in SUPPORTED.items():
        value = header.get(f"{ARCHITECTURE}.{key}", type(only), only)
        if value != only:
            raise ValueError(
                f"{header.path}: {ARCHITECTURE}.{key} must be {only}, got {value}"
            )
    defaults: dict[str, Any] = {"rope_theta": 10000.0}
    if "tokenizer.ggml.tokens" in header.metadata:  # some files say no vocab_size
        defaults["vocab_size"] = len(header.get("tokenizer.ggml.tokens", list))
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(LlamaConfig):
        if field.name in KEYS:
            key, kind = f"{ARCHITECTURE}.{KEYS[field.name]}", field.type
            assert isinstance(kind, type)
            if field.name == "num_key_value_heads":
                defaults[field.name] = fields["num_attention_heads"]
            value = header.get(key, kind, defaults.get(field.name))
            if kind is float:  # the shortest decimal: 1e-05, not 9.9999997e-06
                with np.errstate(over="ignore"):
                    value = float(str(np.float32(value)))
            fields[field.name] = value
    keys = [f"{ARCHITECTURE}.{key}" for key in HEAD_SIZES]
    sizes = {key: header.get(key, int) for key in keys if key in header.metadata}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{header.path}: must be the same size of a head: {sizes}")
    try:
        config = LlamaConfig(
            head_dim=next(iter(sizes.values()), None),
            tie_word_embeddings="output.weight" not in header.tensors,
            **fields,
        )
    except ValueError as error:
        raise ValueError(f"{header.path}: {error}") from None
    return dataclasses.replace(config, rope_scaling=_rope_scaling(header, config))


def _rope_scaling(header: Header, config: LlamaConfig) -> RopeScaling | None:
    """The scaling that a file's factors of the frequencies come from.

    A GGUF file has the factors alone. Llama 3.1 to 3.3 all have the bounds below.
    """
    if ROPE_FACTORS not in header.tensors:
        return None
    tensor = header.tensors[ROPE_FACTORS]
    if tensor.shape != (config.head_size // 2,):
        raise ValueError(
            f"{header.path}: tensor {ROPE_FACTORS} has shape {list(tensor.shape)}, "
            f"expected {[config.head_size // 2]}"
        )
    factors = read_rows(header.path, tensor)[0].astype(np.float64)
    if (factors == 1).all():
        return None
    original = header.get(f"{ARCHITECTURE}.{ORIGINAL_CONTEXT}", int, 8192)
    try:
        scaling = RopeScaling(
            factor=float(f"{factors.max():.6g}"),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=original,
        )
        expected = rope_factors(dataclasses.replace(config, rope_scaling=scaling))
        if np.allclose(factors, expected, rtol=1e-4, atol=0.0):
            return scaling
    except ValueError as error:
        raise ValueError(f"{header.path}: tensor {ROPE_FACTORS}: {error}") from None
    raise ValueError(
        f"{header.path}: tensor {ROPE_FACTORS} must have the factors of Llama 3.1 to "
        f"3.3 (low_freq_factor 1, high_freq_factor 4, original context {original})"
    )


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """What `rope_scaling` divides each rotary frequency by, float32 [head_size / 2]."""
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    return plain / rope_frequencies(config)


def to_gguf(config: LlamaConfig) -> dict[str, Any]:
    """The metadata of a model, without those of its tokenizer."""
    values = {key: getattr(config, field) for field, key in KEYS.items()}
    for key in ("rope.freq_base", "attention.layer_norm_rms_epsilon"):
        values[key] = float(values[key])
    values |= dict.fromkeys(HEAD_SIZES, config.head_size)
    if config.rope_scaling is not None:
        original = config.rope_scaling.original_max_position_embeddings
        values[ORIGINAL_CONTEXT] = original
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


def token_ids(header: Header) -> dict[str, int | list[int]]:
    """The ids of special tokens, as a config.json names them."""
    found: dict[str, int | list[int]] = {}
    for name, keys in {
        "bos_token_id": ("bos_token_id",),
        "eos_token_id": END_KEYS,
        "pad_token_id": ("padding_token_id",),
    }.items():
        present = [f"tokenizer.ggml.{key}" for key in keys]
        ids = [header.get(x, int) for x in present if x in header.metadata]
        if ids:
            found[name] = ids if len(ids) > 1 else ids[0]
    return found
