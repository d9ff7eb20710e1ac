"""The optimizers and schedules that a run can choose."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.llama.training.config import Config
from mofo_jax import all_but_norms_and_biases, filter_by_momentum, scale_by_mofo
from mofo_jax.continual import (
    add_distance_penalty,
    half_fine_tuning_mask,
    scale_by_fisher,
)

Schedule = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]

# What the methods select by, with the same Adam.
SCORES = {
    "mofo": "momentum",
    "gain": "gain",
    "keep": "gain",
    "gradient": "gradient",
    "mv": "update",
}


def make_schedule(config: Config, steps: int) -> Schedule:
    """The learning rate at each step, from 0 to `steps`.

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
    if not warmup:
        return after
    rising = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: Config, schedule: Schedule) -> optax.GradientTransformation:
    """Penalties, clipping, the method and weight decay, as one transformation.

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
        optax.scale_by_learning_rate(schedule),
    )
    if config.method == "hft":
        method = _half(method, config.seed)
    clip = config.clip_norm and optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(_penalty(strengths), clip or optax.identity(), method)


def _direction(config: Config) -> optax.GradientTransformation:
    """What a method makes of gradients, before the learning rate."""
    mu_dtype = config.moments_dtype and jnp.dtype(config.moments_dtype)
    lion = optax.scale_by_lion(0.9, 0.99, mu_dtype=mu_dtype)
    constants: dict[str, Any] = {
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "mu_dtype": mu_dtype,
    }
    adam = optax.scale_by_adam(**constants)
    common: dict[str, Any] = {"filter_mask": all_but_norms_and_biases}
    plain = lion if config.method in ("lion", "mofo-lion") else adam
    if config.importance_source is not None:
        # Within the filter, which has to rank the steps as they are made.
        plain = optax.chain(plain, _metric())
    elif config.method in SCORES:
        score = SCORES[config.method]
        return scale_by_mofo(config.alpha, **constants, score=score, **common)
    if config.method in SCORES:
        # The gain is that of what is added to the parameters.
        descent = optax.chain(plain, optax.scale(-1.0))
        common |= {"score": SCORES[config.method]}
        filtered = filter_by_momentum(descent, config.alpha, **common)
        return optax.chain(filtered, optax.scale(-1.0))
    if config.method == "random":
        common |= {"score": "random", "seed": config.seed}
        return filter_by_momentum(plain, config.alpha, **common)
    if config.method == "mofo-lion":
        return filter_by_momentum(plain, config.alpha, **common)
    return plain


def _metric() -> optax.GradientTransformationExtraArgs:
    """Divides by the extra argument `importance`; `fisher` is what EWC weighs by."""
    scale = scale_by_fisher()

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        importance: Any = None,
        **_: Any,
    ) -> Any:
        return scale.update(updates, state, params, fisher=importance)

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
