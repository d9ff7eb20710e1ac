"""A whole training step with MoFO, timed beside one with optax.adamw."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.turns import ratios, take_turns
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama
from mofo_jax import mofo


def whole_step(tiny: bool, repeats: int) -> dict[str, Any]:
    """Times a Llama's whole step with a batch of 8 x 256: loss, gradient and update."""
    sizes = (256, 64, 128, 2, 4) if tiny else (32000, 768, 2048, 12, 12)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    values: dict[str, Any] = dict(
        zip((*names, *heads), (*sizes, sizes[-1]), strict=True)
    )
    config, vocabulary = LlamaConfig(**values), sizes[0]
    model = Llama(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    shape = (2, 16) if tiny else (8, 257)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, vocabulary)

    def make(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, tokens: jax.Array) -> Any:
            def loss(params: Any) -> jax.Array:
                logits = nnx.merge(graph, params)(tokens[:, :-1])
                losses = optax.softmax_cross_entropy_with_integer_labels(
                    logits, tokens[:, 1:]
                )
                return jnp.mean(losses)

            gradients = jax.grad(loss)(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return step

    runs = {}
    for name, optimizer in {"adamw": optax.adamw(1e-5), "mofo": mofo(1e-5)}.items():
        own = jax.tree.map(jnp.copy, params)
        runs[name] = [make(optimizer), own, jax.jit(optimizer.init)(own)]
    batches = ((tokens + i) % vocabulary for i in range(1 + repeats))
    return ratios(take_turns(runs, batches, warmup=1))
