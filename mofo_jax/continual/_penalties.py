"""Penalties on the distance from reference parameters: L1, L2 and EWC."""

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mofo_jax._checks import at_least_float32
from mofo_jax._leaves import check_same_shapes


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
    ``fisher``, the F of elastic weight consolidation, from :func:`fisher_diagonal`.

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
            check_same_shapes("fisher", fisher, "params", params)

        def add(update: jax.Array, p: jax.Array, start: jax.Array, *f: Any) -> Any:
            moved = p - start.astype(p.dtype)
            gradient = jnp.zeros_like(moved)
            if l1:
                gradient += l1 * jnp.sign(moved)
            if l2:
                gradient += 2 * l2 * moved
            if f:
                gradient += ewc * f[0].astype(p.dtype) * moved
            return update + gradient.astype(update.dtype)

        weights = (fisher,) if ewc else ()
        return jax.tree.map(add, updates, params, reference, *weights), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )


def fisher_diagonal(
    gradient: Callable[[Any, Any], Any], params: Any, examples: Iterable[Any]
) -> Any:
    """The diagonal of the empirical Fisher information: the mean squared gradient.

    On examples that the model itself draws, see :func:`draw_texts`, it estimates the
    Fisher information proper, and needs no pretraining data.

    Args:
      gradient: A function of parameters and one example that returns the gradient of
        the example's negative log-likelihood, a pytree like the parameters. Jit it.
        With a batch's mean in place of an example the result is smaller, by the
        batch's size where gradients are independent.
      params: Pytree of arrays.
      examples: One or more, taken one at a time, so an iterator that makes each when it
        is asked for will do.

    Returns:
      Pytree like the parameters, float32 (or wider where gradients are), 0 or above;
      each leaf sharded like its gradient.

    Raises:
      ValueError: There are no examples.

    >>> import jax, jax.numpy as jnp
    >>> from mofo_jax.continual import fisher_diagonal
    >>> gradient = jax.grad(lambda w, x: 0.5 * jnp.sum((w - x) ** 2))
    >>> fisher_diagonal(gradient, jnp.zeros(2), [jnp.array([1.0, 2.0]), jnp.ones(2)])
    Array([1. , 2.5], dtype=float32)

    References:
      Kirkpatrick et al., `Overcoming catastrophic forgetting in neural networks
      <https://arxiv.org/abs/1612.00796>`_, 2017; Kunstner et al., `Limitations of the
      Empirical Fisher Approximation <https://arxiv.org/abs/1905.12558>`_, 2019.
    """
    total, count = None, 0
    for example in examples:
        squares = _squares(gradient(params, example))
        total = squares if total is None else _add(total, squares)
        count += 1
    if total is None:
        raise ValueError("examples must be one or more, got none")
    return jax.tree.map(lambda x: x / count, total)


@jax.jit
def _squares(tree: Any) -> Any:
    return jax.tree.map(lambda g: jnp.square(at_least_float32(g)), tree)


@jax.jit
def _add(total: Any, squares: Any) -> Any:
    return jax.tree.map(jnp.add, total, squares)
