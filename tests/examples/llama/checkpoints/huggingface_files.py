"""Small Hugging Face checkpoints of Llamas, written by safetensors' own writer."""

import json

import ml_dtypes  # noqa: F401, by which NumPy knows bfloat16
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": [2, 7],
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def tensor_shapes(config=CONFIG):
    """[out, in], by name, in the order of PyTorch's modules."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        shapes |= {f"model.layers.{i}.{n}.weight": s for n, s in layer.items()}
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def random_tensors(dtype="float32", config=CONFIG):
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(config)
    return {n: rng.normal(size=s).astype(dtype) for n, s in shapes.items()}


def write_checkpoint(path, tensors=None, *, files=1, **changes):
    """A directory of `tensors`, by default random ones, with config.json changed."""
    path.mkdir()
    config = CONFIG | changes
    (path / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config=config) if tensors is None else tensors
    if files == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    weight_map = {}
    for i in range(files):
        part = dict(list(tensors.items())[i::files])
        name = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file(part, path / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    write_index(path, weight_map)
    return path


def write_index(path, weight_map):
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(path):
    text = (path / "model.safetensors.index.json").read_text()
    return json.loads(text)["weight_map"]
