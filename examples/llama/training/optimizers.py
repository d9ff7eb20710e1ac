"""The optimizers and schedules that a run can choose."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.llama.training.config import Config
from mofo_jax import all_but_norms_and_biases, filter_by_momentum, scale_by_mofo
from mofo_jax.continual import (
    add_distance_penalty,
    half_fine_tuning_mask,
    scale_by_fisher,
)

# Of a configuration; updates get the extra argument `learning_rate`, and what else
# `steps.make_step` says.
MakeOptimizer = Callable[[Config], optax.GradientTransformation]

# What the methods select by, with the same Adam.
SCORES = {
    "mofo": "momentum",
    "gain": "gain",
    "keep": "gain",
    "gradient": "gradient",
    "mv": "update",
}


def learning_rates(config: Config, steps: int) -> np.ndarray:
    """The learning rate of each step, float32 [steps].

    Raises:
      ValueError: The warm-up is not shorter than the run.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup >= steps:
        raise ValueError(f"warmup_steps must be below {steps} steps, got {warmup}")
    rest = steps - warmup
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if warmup:
        rising = optax.linear_schedule(0.0, peak, warmup)
        after = optax.join_schedules([rising, after], [warmup])
    with jax.numpy_dtype_promotion("standard"):  # integers divided by integers
        found = np.asarray(after(jnp.arange(steps)), np.float32)
    return np.broadcast_to(found, (steps,))  # a constant one is a scalar


def scale_by_given_learning_rate() -> optax.GradientTransformationExtraArgs:
    """As `optax.scale_by_learning_rate`, of the extra argument `learning_rate`.

    An input of the training step, not a constant in it, has runs with other learning
    rates, schedules and lengths share one compiled program.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, learning_rate: Any, **_: Any
    ) -> Any:
        rate = -jnp.asarray(learning_rate)
        return jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Penalties, clipping, the method and weight decay, as one transformation.

    Its updates need the extra argument `learning_rate`, a scalar.

    Adam's constants are those of the authors' code, Lion's those of its paper, and the
    filter leaves norms to the plain optimizer, as the authors' code does. Penalties
    need extra arguments, see `mofo_jax.continual.add_distance_penalty`; so does
    `importance`, the Fisher information that divides steps.
    """
    strengths = config.penalties
    # A decay of 0 would still be computed.
    decay = config.weight_decay and optax.add_decayed_weights(config.weight_decay)
    method = optax.chain(
        _direction(config),
        decay or optax.identity(),
        _penalty(strengths, "-decoupled"),
        scale_by_given_learning_rate(),
    )
    if config.method == "hft":
        method = _half(method, config.seed)
    clip = config.clip_norm and optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(_penalty(strengths), clip or optax.identity(), method)


def _direction(config: Config) -> optax.GradientTransformation:
    """What a method makes of gradients, before the learning rate."""
    mu_dtype = config.moments_dtype and jnp.dtype(config.moments_dtype)
    constants: dict[str, Any] = {
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "mu_dtype": mu_dtype,
    }
    metric = [] if config.importance_source is None else [in_metric()]
    common: dict[str, Any] = {"filter_mask": all_but_norms_and_biases}
    if config.method in SCORES:
        common |= {"score": SCORES[config.method]}
        common |= {"precondition": metric[0] if metric else None}
        return scale_by_mofo(config.alpha, **constants, **common)
    plain = {
        "lion": optax.scale_by_lion(0.9, 0.99, mu_dtype=mu_dtype),
        "sgd": optax.trace(0.9, accumulator_dtype=mu_dtype),
    }.get(config.method.removeprefix("mofo-"), optax.scale_by_adam(**constants))
    # Within the filter, which has to rank the steps that are made.
    inner = optax.chain(plain, *metric)
    if config.method == "random":
        common |= {"score": "random", "seed": config.seed}
    elif config.method != "mofo-lion":
        return inner
    return filter_by_momentum(inner, config.alpha, **common)


def _importance(updates: Any, extra: Mapping[str, Any]) -> Any:
    """Not the extra argument `fisher`, which is what EWC weighs by."""
    return extra.get("importance")


def in_metric(
    fisher: Callable[[Any, Mapping[str, Any]], Any] = _importance, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_fisher` with its options, by the extra argument `importance`.

    Or by what `fisher` makes of the updates and all extra arguments.
    """
    scale = scale_by_fisher(**options)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return scale.update(updates, state, params, fisher=fisher(updates, extra))

    return optax.GradientTransformationExtraArgs(scale.init, update)


def _half(method: optax.GradientTransformation, seed: int) -> Any:
    """The method for the half of the parameters that HFT trains, the others resting."""

    def labels(params: Any) -> Any:
        mask = half_fine_tuning_mask(params, seed)
        return jax.tree.map(lambda trained: "train" if trained else "rest", mask)

    return optax.partition(
        {"train": method, "rest": optax.set_to_zero()},
        labels,
        mask_compatible_extra_args=True,  # what penalties compare with
    )


def _penalty(strengths: dict[str, float], end: str = "") -> Any:
    kinds = ("l1", "l2") if end else ("l1", "l2", "ewc")
    chosen = {kind: strengths.get(kind + end, 0.0) for kind in kinds}
    return add_distance_penalty(**chosen) if any(chosen.values()) else optax.identity()
