"""Hugging Face's config.json of a Llama, to and from `LlamaConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from examples.llama.model.architectures import LlamaConfig, RopeScaling

# transformers' LlamaConfig has these where a config.json leaves them out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# What any other value would mean is not in `Llama`.
SUPPORTED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def from_hugging_face(values: Any) -> LlamaConfig:
    """The configuration that a config.json describes, as transformers reads it.

    Args:
      values: The file's content. Rotary settings may be as transformers 4 has them,
        "rope_theta" and "rope_scaling" (with "rope_type", formerly "type"), or as 5
        has them, all in "rope_parameters". Keys that do not matter here are ignored.

    Raises:
      ValueError: It is no Llama, has a feature that `Llama` lacks, or a value out of
        range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"must be an object, got {type(values).__name__}")
    for key, allowed in {"model_type": "llama", **SUPPORTED}.items():
        value = values.get(key, SUPPORTED.get(key))
        if value != allowed:
            raise ValueError(f"{key} must be {allowed!r}, got {value!r}")
    fields = {key: values.get(key, default) for key, default in DEFAULTS.items()}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if not isinstance(tied := fields["tie_word_embeddings"], bool):
        raise ValueError(f"tie_word_embeddings must be true or false, got {tied!r}")
    return LlamaConfig(**fields, **_rotary(values))


def _rotary(values: Mapping[str, Any]) -> dict[str, Any]:
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{key} must be an object, got {rope!r}")
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"{key}: rope_type must be default or llama3, got {rope_type}")
    if (factor := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{key}: partial_rotary_factor must be 1.0, got {factor!r}")
    if rope_type == "default":
        return {"rope_theta": theta}
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    for name in names:
        if name != "rope_type" and name not in rope:
            raise ValueError(f"{key}: rope_type llama3 needs {name}, found none")
    try:
        scaling = RopeScaling(**{n: rope[n] for n in names if n in rope})
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return {"rope_theta": theta, "rope_scaling": scaling}


def to_hugging_face(config: LlamaConfig) -> dict[str, Any]:
    """The config.json of a model, in the keys that transformers 4 and 5 and vLLM read.

    transformers 5 writes other keys for the rotary settings, but reads these too.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": SUPPORTED["hidden_act"],
        "attention_bias": SUPPORTED["attention_bias"],
        "mlp_bias": SUPPORTED["mlp_bias"],
        **dataclasses.asdict(config),
    }
