"""The optimizers and schedules that a run can choose."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from examples.llama.config import Config
from mofo_jax import all_but_norms_and_biases, filter_by_momentum, mofo

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


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


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Clipping, the method, and decoupled weight decay, as one transformation.

    Adam's constants are those of the authors' code, Lion's those of its paper, and the
    filter leaves norms to the plain optimizer, as the authors' code does.
    """
    rate = make_schedule(config, steps)
    mu_dtype = config.moments_dtype and jnp.dtype(config.moments_dtype)
    adam = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "mu_dtype": mu_dtype}
    adam["weight_decay"] = config.weight_decay
    if config.method == "adamw":
        method = optax.adamw(rate, **adam)
    elif config.method == "mofo":
        method = mofo(rate, config.alpha, filter_mask=all_but_norms_and_biases, **adam)
    else:
        lion = optax.scale_by_lion(0.9, 0.99, mu_dtype=mu_dtype)
        if config.method == "mofo-lion":
            lion = filter_by_momentum(
                lion, config.alpha, filter_mask=all_but_norms_and_biases
            )
        decay = optax.add_decayed_weights(config.weight_decay)
        method = optax.chain(lion, decay, optax.scale_by_learning_rate(rate))
    if config.clip_norm is None:
        return method
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), method)
