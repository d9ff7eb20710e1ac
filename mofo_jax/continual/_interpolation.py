"""Weight interpolation: between the pretrained and the fine-tuned model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mofo_jax._checks import at_least_float32, check_number
from mofo_jax._leaves import check_same_shapes, leaf_names

Weight = jax.typing.ArrayLike | Callable[[str], jax.typing.ArrayLike]


def interpolate(pretrained: Any, tuned: Any, weight: Weight) -> Any:
    r"""Parameters on the line from the pretrained to the fine-tuned ones.

    .. math::
      (1 - w)\, \theta_0 + w\, \theta

    Args:
      pretrained: Pytree of arrays.
      tuned: Pytree of the same structure and shapes.
      weight: w, the share of the fine-tuned ones, a number (Wise-FT); or a function of
        a parameter's name such as ``layers/0/self_attn/q_proj/kernel`` that returns
        one, for a weight per layer (HMA). Outside of [0, 1] it extrapolates.

    Returns:
      Pytree in the dtypes of ``tuned``, computed in float32 or wider; where w is the
      number 1, or 0 and the dtypes agree, the very values of the one side.

    Raises:
      ValueError: The structures or shapes differ.
      TypeError: The weight is neither a number nor a function.

    >>> import jax.numpy as jnp
    >>> from mofo_jax.continual import interpolate
    >>> interpolate({"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}, 0.5)
    {'w': Array([0.5, 1. ], dtype=float32)}

    References:
      Wortsman et al., `Robust fine-tuning of zero-shot models
      <https://arxiv.org/abs/2109.01903>`_, 2022, equation 1 (Wise-FT); Lin et al.,
      `Mitigating the Alignment Tax of RLHF <https://arxiv.org/abs/2309.06256>`_, 2024
      (HMA).
    """
    if not callable(weight):
        check_number("weight", weight, "a number or a function of a parameter's name")
    check_same_shapes("tuned", tuned, "pretrained", pretrained)

    def between(name: str, start: jax.Array, end: jax.Array) -> jax.Array:
        w: Any = weight(name) if callable(weight) else weight
        wide = at_least_float32(end)
        w = jnp.asarray(w, wide.dtype)
        mixed: jax.Array = (1 - w) * start.astype(wide.dtype) + w * wide
        return mixed.astype(end.dtype)

    leaves = map(
        between, leaf_names(tuned), jax.tree.leaves(pretrained), jax.tree.leaves(tuned)
    )
    return jax.tree.unflatten(jax.tree.structure(tuned), list(leaves))
