"""Optimizers of the frontier that the trainer does not have."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.llama.training.config import Config
from examples.llama.training.optimizers import (
    MakeOptimizer,
    in_metric,
    make_optimizer,
    scale_by_given_learning_rate,
)
from mofo_jax import all_but_norms_and_biases, filter_by_momentum, scale_by_mofo
from mofo_jax.continual import FactoredFisher


def partially_adaptive(config: Config) -> optax.GradientTransformation:
    """Adam's momentum over the fourth root of the second moment, at unit scale.

    Between Adam, which takes the square root, and momentum alone, the scale of the
    updates is the gradients', so they are normalized.
    """
    del config
    return optax.chain(_padam(), at_unit_scale(), scale_by_given_learning_rate())


def _padam() -> optax.GradientTransformation:
    """The direction of Padam (arXiv 1806.06763), at a power of 1/4."""
    b2 = 0.999
    adam = optax.scale_by_adam(0.9, b2, 1e-8)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = adam.update(updates, state, params)
        correction = 1 - b2 ** state.count.astype(jnp.float32)
        updates = jax.tree.map(
            lambda u, v: u * (v / correction) ** 0.25, updates, state.nu
        )
        return updates, state

    return optax.GradientTransformation(adam.init, update)


def at_unit_scale() -> optax.GradientTransformationExtraArgs:
    """Updates over the running root of their mean square, of all leaves together."""
    return in_metric(lambda updates, _: optax.tree.ones_like(updates))


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


def keep_with(
    change: Callable[[Any], Any] | None = None,
    *,
    fisher: str = "importance",
    **options: Any,
) -> MakeOptimizer:
    """The method keep with something else in its metric.

    Args:
      change: What is made of each leaf of the Fisher information.
      fisher: The extra argument that this is: "importance" is factored, "fisher" dense.
      options: Of `scale_by_fisher`.
    """

    def changed(updates: Any, extra: Mapping[str, Any]) -> Any:
        found = extra[fisher]
        if change is None:
            return found
        return jax.tree.map(change, found, is_leaf=_is_factored)

    return lambda config: keep_in(in_metric(changed, **options), config)


def keep_in(
    metric: optax.GradientTransformation, config: Config
) -> optax.GradientTransformation:
    """The method keep, its steps changed by something else than `in_metric`."""
    keep = scale_by_mofo(
        config.alpha,
        score="gain",
        precondition=metric,
        filter_mask=all_but_norms_and_biases,
    )
    return optax.chain(keep, scale_by_given_learning_rate())


def keep_partially_adaptive(config: Config) -> optax.GradientTransformation:
    """The method keep with Padam's direction instead of Adam's."""
    # The gain is that of what is added to the parameters.
    descent = optax.chain(_padam(), in_metric(), optax.scale(-1.0))
    keep = filter_by_momentum(
        descent, config.alpha, score="gain", filter_mask=all_but_norms_and_biases
    )
    return optax.chain(keep, optax.scale(-1.0), scale_by_given_learning_rate())


def _is_factored(leaf: Any) -> bool:
    return isinstance(leaf, FactoredFisher)


def root(leaf: Any) -> Any:
    """The square root of each entry."""
    if not _is_factored(leaf):
        return jnp.sqrt(leaf)
    rows, columns = map(jnp.sqrt, leaf)
    # The entry is rows * columns over the mean of rows, before as after.
    mean = jnp.mean(leaf.rows, axis=-1, keepdims=True)
    after = jnp.mean(rows, axis=-1, keepdims=True)
    return FactoredFisher(rows, columns * after / jnp.sqrt(mean))


def by_leaf(leaf: Any) -> Any:
    """Relative to the mean of the leaf instead of that of all leaves."""
    return jax.tree.map(lambda x: x / jnp.mean(x), leaf)


def leaf_mean(leaf: Any) -> Any:
    """One number for the whole leaf."""
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.mean(x)), leaf)


def in_bfloat16(leaf: Any) -> Any:
    return optax.tree.cast(leaf, jnp.bfloat16)
