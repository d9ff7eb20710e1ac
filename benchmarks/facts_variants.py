"""What benchmarks/facts.py compares: variants of the optimizer, and of the task."""

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
from mofo_jax.continual import half_fine_tuning_mask


class Context(NamedTuple):
    """What a variant may use, all of it possibly traced."""

    rate: Any  # the learning rate, or another point of the variant's curve
    remaining: optax.Schedule  # of a step, the share of the run that is left
    pretrained: Any
    importance: Any  # of every entry for the pretrained knowledge, or None


class Variant(NamedTuple):
    """A curve of the study."""

    title: str
    optimizer: Callable[[Context], optax.GradientTransformation]
    rates: tuple[float, ...]
    group: str = ""  # the task, whose AdamW the variant is held against
    steps: int = 300
    batch_size: int | None = None  # new facts a step, or all
    new_facts: int = 100
    hidden_size: int = 64
    self_replay: float = 0.0  # weight of the KL on as many of the old prompts
    importance: bool = False
    interpolate: float | None = None


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


def persistent(every: int, alpha: float = 0.1) -> Any:
    """A mask of the largest momenta, chosen anew only `every` so many steps."""

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
                    step % every == 0, top_fraction_mask(m, alpha if f else 1.0), old
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


def _rows(leaf: jax.Array) -> int | None:
    return 0 if leaf.ndim > 1 else None


USUAL = (1e-5, 2.5e-5, 6e-5, 1.5e-4, 4e-4)
LARGER = (3e-5, 7e-5, 1.8e-4, 4.5e-4, 1.1e-3)
L2, EWC = (1e-2, 1e-1, 0.3, 1.0, 3.0), (1.0, 10.0, 100.0, 1e3, 1e4)  # strengths
LARGEST = (1e-4, 2.5e-4, 6e-4, 1.5e-3, 4e-3)


def _task(group: str, faster: float = 1.0, **task: Any) -> dict[str, Variant]:
    """AdamW, MoFO and the gradient filter on one task."""
    name = group or "usual"
    usual, larger = (tuple(faster * r for r in rates) for rates in (USUAL, LARGER))
    return {
        f"adamw, {name}": Variant("AdamW", adamw, usual, group, **task),
        f"mofo, {name}": Variant("MoFO 10%", filtered(), larger, group, **task),
        f"gradient, {name}": Variant(
            "gradient filter 10%", scored("gradient"), larger, group, **task
        ),
    }


def _scored(title: str, score: Any, rates: Any = LARGER, **task: Any) -> Variant:
    return Variant(title, scored(score), rates, **task)


VARIANTS: dict[str, Variant] = {
    **_task(""),
    "mofo 3%": Variant("MoFO 3%", filtered(0.03), LARGEST),
    "mofo 30%": Variant("MoFO 30%", filtered(0.3), USUAL),
    "all leaves": Variant("MoFO, norms filtered too", filtered(mask=None), LARGER),
    "projections": Variant(
        "MoFO, embedding and head not filtered", filtered(mask=projections_only), USUAL
    ),
    "rows": Variant(
        "MoFO, every row a block",
        filtered(block_axes=lambda p: jax.tree.map(_rows, p)),
        LARGER,
    ),
    "gradient 3%": Variant("gradient filter 3%", scored("gradient", 0.03), LARGEST),
    "mv": _scored("MV filter 10%", "update"),
    "random": _scored("random filter 10%", "random", LARGEST),
    "hft": Variant("HFT", half, LARGER),
    "falling": Variant(
        "MoFO, alpha from 20% to 2%", scored("momentum", falling), LARGER
    ),
    "rising": Variant("MoFO, alpha from 2% to 20%", scored("momentum", rising), LARGER),
    "gradient rising": Variant(
        "gradient filter, from 2% to 20%", scored("gradient", rising), LARGER
    ),
    "fixed": Variant(
        "MoFO, mask of the first step for good", persistent(10**9), LARGEST
    ),
    "slow": Variant("MoFO, mask renewed every 30 steps", persistent(30), LARGER),
    "sticky": _scored("MoFO, entries moved before x 4", sticky(4.0)),
    "spared": _scored(
        "by momentum over sqrt of Fisher", spared, LARGEST, importance=True
    ),
    "damped": Variant("AdamW damped by Fisher", damped, LARGER, importance=True),
    "l2": Variant("AdamW, L2", penalized(adamw, 4e-4), L2),
    "l2 mofo": Variant("MoFO 10%, L2", penalized(filtered(), 1.1e-3), L2),
    "ewc": Variant("AdamW, EWC", penalized(adamw, 4e-4), EWC, importance=True),
    "ewc mofo": Variant(
        "MoFO 10%, EWC", penalized(filtered(), 1.1e-3), EWC, importance=True
    ),
    "ewc gradient": Variant(
        "gradient filter 10%, EWC",
        penalized(scored("gradient"), 1.1e-3),
        EWC,
        importance=True,
    ),
    "wise-ft": Variant("AdamW, Wise-FT 0.7", adamw, LARGER, interpolate=0.7),
    "wise-ft mofo": Variant("MoFO, Wise-FT 0.7", filtered(), LARGEST, interpolate=0.7),
    "self": Variant("AdamW, self-replay", adamw, USUAL, self_replay=1.0),
    "self mofo": Variant("MoFO, self-replay", filtered(), LARGER, self_replay=1.0),
    **_task("batches of 10", batch_size=10),
    **_task("100 steps", 2.0, steps=100),
    **_task("1000 steps", 0.5, steps=1000),
    **_task("20 new facts", new_facts=20),
    **_task("400 new facts", new_facts=400),
    **_task("hidden size 128", 0.7, hidden_size=128),
}
