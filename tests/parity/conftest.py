"""Random models of transformers, one of each family, that ours are compared with."""

import pytest
import torch
import transformers

from tests.examples.llama.conftest import data_dir, stories_model  # noqa: F401

VOCABULARY = 199
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "eos_token_id": None,  # else transformers' generate would stop at a 2
}
# Of a context so short that tokens of a test lie on both sides of its end.
SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama2-7b": {"num_attention_heads": 4},
    "tinyllama-1.1b": {"num_key_value_heads": 1},
    "llama3.1-8b": {
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": SCALING | {"factor": 8.0},
    },
    # Its own head_dim is hidden_size / heads; another one tells more.
    "llama3.2-1b": {
        "num_key_value_heads": 4,
        "head_dim": 12,
        "rope_theta": 500000.0,
        "rope_scaling": SCALING | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
}


def random_model(**changes):
    """A LlamaForCausalLM in float32, norms included in what is random."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**COMMON | changes)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="session", params=FAMILIES)
def reference(request):
    return random_model(**FAMILIES[request.param])


@pytest.fixture(scope="session")
def checkpoint(reference, tmp_path_factory):
    """The directory that transformers saved `reference` to."""
    path = tmp_path_factory.mktemp("checkpoint")
    reference.save_pretrained(path)
    return path
