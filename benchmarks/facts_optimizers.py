"""The optimizers of benchmarks/facts_variants.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mofo_jax import (
    all_but_norms_and_biases,
    filter_by_momentum,
    mofo,
    top_fraction_mask,
)
from mofo_jax.continual import half_fine_tuning_mask, scale_by_fisher


class Context(NamedTuple):
    """What a variant may use, all of it possibly traced."""

    rate: Any  # the learning rate, or another point of the variant's curve
    remaining: optax.Schedule  # of a step, the share of the run that is left
    pretrained: Any
    importance: Any  # of every entry for the pretrained knowledge, or None


def adamw(context: Context) -> optax.GradientTransformation:
    return optax.adam(context.rate)


def filtered(
    alpha: Any = 0.1, mask: Any = all_but_norms_and_biases, **options: Any
) -> Callable[[Context], optax.GradientTransformation]:
    """MoFO, with any of the choices of `mofo`."""

    def optimizer(context: Context) -> optax.GradientTransformation:
        return mofo(context.rate, alpha, filter_mask=mask, **options)

    return optimizer


def scored(
    score: Any, alpha: Any = 0.1
) -> Callable[[Context], optax.GradientTransformation]:
    """Adam filtered by another score, or with another alpha of the context."""

    def optimizer(context: Context) -> optax.GradientTransformation:
        return filter_by_momentum(
            optax.adam(context.rate),
            alpha(context) if callable(alpha) else alpha,
            score=score(context) if callable(score) else score,
            filter_mask=all_but_norms_and_biases,
        )

    return optimizer


def falling(context: Context) -> optax.Schedule:
    """Alpha from 20% to 2%."""
    return lambda step: 0.02 + 0.18 * context.remaining(step)


def rising(context: Context) -> optax.Schedule:
    """Alpha from 2% to 20%."""
    return lambda step: 0.2 - 0.18 * context.remaining(step)


def persistent(every: int) -> Any:
    """A mask of the largest 10% of momenta, chosen anew only `every` so many steps."""

    def optimizer(context: Context) -> optax.GradientTransformation:
        adam = optax.adam(context.rate)

        def init(params: Any) -> Any:
            masks = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)
            return adam.init(params), masks, jnp.int32(0)

        def update(gradients: Any, state: Any, params: Any = None) -> Any:
            inner, masks, step = state
            updates, inner = adam.update(gradients, inner, params)
            chosen = all_but_norms_and_biases(params)
            momenta = optax.tree.get(inner, "mu")
            masks = jax.tree.map(
                lambda f, m, old: jnp.where(
                    step % every == 0, top_fraction_mask(m, 0.1 if f else 1.0), old
                ),
                chosen,
                momenta,
                masks,
            )
            updates = jax.tree.map(jnp.multiply, updates, masks)
            return updates, (inner, masks, step + 1)

        return optax.GradientTransformation(init, update)

    return optimizer


def sticky(bonus: float) -> Any:
    """Momenta of entries that have moved before count `bonus` times as much."""

    def score(context: Context) -> Any:
        def rule(gradients: Any, updates: Any, state: Any, params: Any) -> Any:
            def one(m: jax.Array, p: jax.Array, p0: jax.Array) -> jax.Array:
                return jnp.where(p != p0, bonus * m, m)

            return jax.tree.map(
                one, optax.tree.get(state, "mu"), params, context.pretrained
            )

        return rule

    return score


def spared(context: Context) -> Any:
    """Momenta count less, the larger the Fisher information is beside its mean."""

    def rule(gradients: Any, updates: Any, state: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda m, f: m / jnp.sqrt(f / (jnp.mean(f) + 1e-30) + 0.01),
            optax.tree.get(state, "mu"),
            context.importance,
        )

    return rule


def damped(context: Context) -> optax.GradientTransformation:
    """AdamW's updates, divided by 1 + the relative Fisher information."""
    scale = jax.tree.map(
        lambda f: 1 / (1 + f / (jnp.mean(f) + 1e-30)), context.importance
    )
    damping = optax.stateless(
        lambda updates, _: jax.tree.map(jnp.multiply, updates, scale)
    )
    return optax.chain(adamw(context), damping)


def in_metric(context: Context) -> optax.GradientTransformation:
    """Adam's steps in the pretrained model's metric."""
    return optax.chain(
        optax.scale_by_adam(),
        scale_by_fisher(context.importance),
        optax.scale_by_learning_rate(context.rate),
    )


def keeping(context: Context) -> optax.GradientTransformation:
    """Of those, the entries move that bring the loss down most."""
    metric = scale_by_fisher(context.importance)
    return filtered(score="gain", precondition=metric)(context)


def penalized(
    after: Callable[[Context], optax.GradientTransformation], rate: float
) -> Callable[[Context], optax.GradientTransformation]:
    """A penalty in the loss, L2 or EWC, and an optimizer after it at a rate of its own.

    The curve goes along the penalty's strength, in place of the learning rate.
    """

    def optimizer(context: Context) -> optax.GradientTransformation:
        weight = context.importance
        if weight is None:
            weight = jax.tree.map(lambda _: 2.0, context.pretrained)

        def pull(gradients: Any, params: Any) -> Any:
            return jax.tree.map(
                lambda g, w, p, p0: g + context.rate * w * (p - p0),
                gradients,
                weight,
                params,
                context.pretrained,
            )

        own = context._replace(rate=rate)
        return optax.chain(optax.stateless(pull), after(own))

    return optimizer


def half(context: Context) -> optax.GradientTransformation:
    def frozen(params: Any) -> Any:
        return jax.tree.map(lambda x: not x, half_fine_tuning_mask(params, 0))

    return optax.chain(
        optax.adam(context.rate), optax.masked(optax.set_to_zero(), frozen)
    )


def projections_only(params: Any) -> Any:
    """Leaves that are filtered, but for the embedding and the head."""
    chosen = all_but_norms_and_biases(params)
    return jax.tree.map_with_path(
        lambda path, x: (
            x
            and not any(
                name in jax.tree_util.keystr(path) for name in ("embed", "head")
            )
        ),
        chosen,
    )


def rows(leaf: jax.Array) -> int | None:
    """The axis along which each row of a matrix is a block."""
    return 0 if leaf.ndim > 1 else None
