"""Operations by counting a compiled step's products, and the peak that was measured."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from examples.llama.model import loss
from examples.llama.model.architectures import ARCHITECTURES
from examples.llama.model.flops import peak_flops, training_flops
from examples.llama.model.lora import add_lora
from examples.llama.model.loss import next_token_loss
from tests.examples.llama.model.test_llama import make


def counted(model, kind, length):
    """Operations of a step for each token, as XLA counts them."""
    graph, params, frozen = nnx.split(model, kind, ...)
    tokens = jnp.zeros((2, length), jnp.int32)
    batch = {
        "tokens": tokens,
        "loss_mask": tokens == 0,
        "positions": tokens,
        "segment_ids": tokens,
    }

    def total(params):
        return next_token_loss(nnx.merge(graph, params, frozen), batch, packed=False)[0]

    compiled = jax.jit(jax.grad(total)).lower(params).compile()
    return compiled.cost_analysis()["flops"] / tokens.size


@pytest.mark.parametrize("lora", [False, True])
def test_training_flops(lora, monkeypatch):
    # XLA counts a loop's body once, so there must be but one part of the logits.
    monkeypatch.setattr(loss, "CHUNKS", 1)
    model = make(hidden_size=128, intermediate_size=384, vocab_size=512)
    expected = training_flops(model.config, 32, lora=lora)
    kind = nnx.Param
    if lora:
        add_lora(model, 1, 1.0, rngs=nnx.Rngs(0))
        kind = nnx.LoRAParam
    # XLA counts norms, softmax and the masked half of attention too.
    assert expected < counted(model, kind, 32) < 1.25 * expected


def test_known_size():
    """6 N for each token, and the attention's part, for Llama 2 7B."""
    flops = training_flops(ARCHITECTURES["llama2-7b"], 1024)
    weights = 6_738_415_616 - 32000 * 4096  # the embedding is looked up
    assert flops == pytest.approx(6 * weights + 6 * 32 * 4096 * 1024, rel=1e-3)


def test_peak():
    peak, source = peak_flops(jax.devices()[0], "float32")
    assert 1e9 < peak < 1e14
    assert source == "measured, product of 2048 x 2048 float32"
