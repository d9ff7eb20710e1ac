"""Optimizers of the frontier that the trainer does not have."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.llama.training.config import Config
from examples.llama.training.optimizers import (
    make_optimizer,
    scale_by_given_learning_rate,
)
from mofo_jax.continual import scale_by_fisher


def partially_adaptive(config: Config) -> optax.GradientTransformation:
    """Adam's momentum over the fourth root of the second moment, at unit scale.

    The power of Padam (arXiv 1806.06763). Between Adam, which takes the square root,
    and momentum alone, the scale of the updates is the gradients', so they are
    normalized.
    """
    del config
    b2 = 0.999
    adam = optax.scale_by_adam(0.9, b2, 1e-8)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = adam.update(updates, state, params)
        correction = 1 - b2 ** state.count.astype(jnp.float32)
        updates = jax.tree.map(
            lambda u, v: u * (v / correction) ** 0.25, updates, state.nu
        )
        return updates, state

    root = optax.GradientTransformation(adam.init, update)
    return optax.chain(root, at_unit_scale(), scale_by_given_learning_rate())


def at_unit_scale() -> optax.GradientTransformationExtraArgs:
    """Updates over the running root of their mean square, of all leaves together."""
    scale = scale_by_fisher()

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        ones = optax.tree.ones_like(updates)
        return scale.update(updates, state, params, fisher=ones)

    return optax.GradientTransformationExtraArgs(scale.init, update)


def finch(config: Config) -> optax.GradientTransformation:
    """FINCH (arXiv 2605.20005): the learning rate falls as the batch's loss rises.

    Its bound on what a step forgets is the learning rate times the root of the batch's
    loss. We hold that product to the schedule's rate: the rate is divided by the root.
    The abstract has the bound, and that the rate is smaller on batches of high loss and
    grows as the model converges. We had no text of the paper with its exact formula,
    nor with limits or smoothing that this may lack.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, value: jax.Array, **_: Any
    ) -> Any:
        factor = 1 / jnp.sqrt(jnp.maximum(value, 1e-6))
        return jax.tree.map(lambda u: factor.astype(u.dtype) * u, updates), state

    by_loss = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    return optax.chain(make_optimizer(config), by_loss)
