"""Penalties on the distance from reference parameters: L1, L2 and EWC."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mofo_jax._leaves import check_same_shapes
from mofo_jax.continual._fisher import dense_fisher, match_fisher


def add_distance_penalty(
    *, l1: float = 0.0, l2: float = 0.0, ewc: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of a penalty on the distance from reference parameters.

    .. math::
      \lambda_1 \|\theta - \theta_0\|_1 + \lambda_2 \|\theta - \theta_0\|_2^2
        + \frac{\lambda_{EWC}}{2} \sum_i F_i (\theta_i - \theta_{0,i})^2

    Before an optimizer in :func:`optax.chain` the penalty is part of the loss, as the
    paper compares with. After it, and before the learning rate, it is decoupled as
    AdamW's weight decay is: no moment has it, and no momentum filter sees it. The
    gradient at distance zero is zero.

    The reference is an extra argument of ``update``, so that no state and no
    checkpoint holds it: ``update(gradients, state, params, reference=theta_0)``. So is
    ``fisher``, the F of elastic weight consolidation, from :func:`fisher_diagonal`,
    dense or factored.

    Args:
      l1: Strength of the absolute distance, 0 or above.
      l2: Strength of the squared distance, 0 or above. Its gradient has a factor of 2.
      ewc: Strength of the squared distance weighted by the Fisher information, 0 or
        above. Its gradient has a factor of 1.

    Returns:
      A transformation without state. The updates keep their dtypes; differences are
      taken in the parameters' dtype.

    Raises:
      ValueError: A strength below 0 or not finite; at update: no params or reference
        given, or of other shapes.

    >>> import jax.numpy as jnp
    >>> from mofo_jax.continual import add_distance_penalty
    >>> penalty = add_distance_penalty(l2=0.5)
    >>> params, pretrained = jnp.array([1.0, 4.0]), jnp.array([1.0, 1.0])
    >>> state = penalty.init(params)
    >>> gradients = jnp.array([0.1, 0.1])
    >>> penalty.update(gradients, state, params, reference=pretrained)[0]
    Array([0.1, 3.1], dtype=float32)

    References:
      Kirkpatrick et al., `Overcoming catastrophic forgetting in neural networks
      <https://arxiv.org/abs/1612.00796>`_, 2017, equation 3 (EWC).
    """
    for name, value in {"l1": l1, "l2": l2, "ewc": ewc}.items():
        if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number, 0 or above, got {value!r}")

    def update_fn(
        updates: Any,
        state: optax.EmptyState,
        params: Any = None,
        *,
        reference: Any = None,
        fisher: Any = None,
        **_: Any,
    ) -> tuple[Any, optax.EmptyState]:
        if params is None or reference is None:
            raise ValueError(
                "add_distance_penalty needs params and reference: call "
                "update(gradients, state, params, reference=...)"
            )
        check_same_shapes("reference", reference, "params", params)
        if ewc:
            if fisher is None:
                raise ValueError("ewc needs the extra argument fisher")
            fisher = match_fisher(fisher, "params", params)

        def add(update: jax.Array, p: jax.Array, start: jax.Array, *f: Any) -> Any:
            moved = p - start.astype(p.dtype)
            gradient = jnp.zeros_like(moved)
            if l1:
                gradient += l1 * jnp.sign(moved)
            if l2:
                gradient += 2 * l2 * moved
            if f:
                gradient += ewc * dense_fisher(f[0]).astype(p.dtype) * moved
            return update + gradient.astype(update.dtype)

        weights = (fisher,) if ewc else ()
        return jax.tree.map(add, updates, params, reference, *weights), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )
