"""The step in the metric of the pretrained model's Fisher information."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mofo_jax._checks import at_least_float32, check_number
from mofo_jax.continual._fisher import (
    abs_square,
    match_fisher,
    relative_fisher,
    stacks,
)


class ScaleByFisherState(NamedTuple):
    """State of :func:`scale_by_fisher`.

    Attributes:
      steps: int32 scalar, number of updates so far. Not named count, so that
        ``optax.tree.get(state, "count")`` finds that of Adam.
      mean_square: float32 scalar, running mean of the squared scaled updates over all
        entries, not yet corrected for its start at zero.
    """

    steps: jax.Array
    mean_square: jax.Array


def scale_by_fisher(
    fisher: Any = None,
    *,
    damping: jax.typing.ArrayLike = 0.01,
    decay: jax.typing.ArrayLike = 0.99,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides updates by the Fisher information, so that known things move less.

    .. math::
      s_t &= u_t \,/\, (F / \bar F + \epsilon) \\
      u_t &\leftarrow s_t / \sqrt{q_{t-1} / (1 - d^{t-1})} \\
      q_t &= d\, q_{t-1} + (1 - d)\, \overline{|s_t|^2}

    with the damping :math:`\epsilon` and the decay d. Both means, :math:`\bar F` and
    :math:`\overline{|s_t|^2}`, are over all entries of all leaves together. So the
    scale of F changes nothing, nor does a constant scale of the updates after the first
    step, and the learning rate is the typical size of a step. At the first step, when
    there is no mean yet, :math:`s_t` is multiplied by :math:`\epsilon`, so that updates
    of magnitude 1, as Adam's are then, stay at 1 where F is zero and are smaller
    elsewhere.

    F is the diagonal Fisher information of the pretrained model, from
    :func:`fisher_diagonal` on texts that the model drew, see :func:`draw_texts`. It may
    be factored. The transformation goes after one that gives the direction, such as
    :func:`optax.scale_by_adam`, and before the learning rate and a filter: a filter
    that ranks updates has to see the scaled ones.

    The rule is that of natural continual learning,

    .. math::
      \theta \leftarrow \theta - \eta\,
        [m / (F + \epsilon) + \lambda (\theta - \theta_0)].

    Four things differ: F comes from the model's own texts instead of earlier tasks'
    data; the direction may be Adam's and not only momentum m; nothing pulls back to
    the start; F and the step are normalized.

    A non-finite update reaches the running mean, and so all later updates; guard with
    :func:`optax.apply_if_finite`. Inside :func:`jax.shard_map` the means are global
    over automatic mesh axes and per shard over manual ones.

    Args:
      fisher: F, a pytree like the parameters of real arrays, 0 or above, of any
        floating dtype. A leaf may be a :class:`FactoredFisher` instead. None takes the
        extra argument ``fisher`` of ``update``, which is for large ones: given here,
        F is a constant of the compiled program. Either way no state and no checkpoint
        holds it. If both are given, this one counts. A single array needs
        ``static_args="fisher"`` under :func:`optax.inject_hyperparams`.
      damping: Added to the relative Fisher information, above 0. It limits how much
        more the entries that matter least move.
      decay: Decay of the running mean square, in [0, 1). 0 takes that of the step
        before alone.

    Returns:
      A transformation with a :class:`ScaleByFisherState`. The updates keep their
      dtypes. Arithmetic is in float32 or wider, entry by entry, and stores no copies.

    Raises:
      ValueError: A number outside its range; at update: no fisher, or one of another
        structure or other shapes than the updates.
      TypeError: A number that is none.

    >>> import jax.numpy as jnp, optax
    >>> from mofo_jax.continual import scale_by_fisher
    >>> fisher = jnp.array([0.0, 2.0])  # relative to the mean 0 and 2
    >>> scale = scale_by_fisher(fisher, damping=1.0)
    >>> params, updates = jnp.zeros(2), jnp.array([1.0, 3.0])
    >>> scale.update(updates, scale.init(params))[0].round(3)  # 1/1, 3/3
    Array([1., 1.], dtype=float32)

    Under a filter, with the Fisher information as an extra argument:

    >>> from mofo_jax import filter_by_momentum
    >>> inner = optax.chain(
    ...     optax.scale_by_adam(), scale_by_fisher(), optax.scale_by_learning_rate(0.1))
    >>> optimizer = filter_by_momentum(inner, alpha=0.5, score="update")
    >>> gradients = jnp.array([0.2, 0.3])
    >>> updates, _ = optimizer.update(
    ...     gradients, optimizer.init(params), params, fisher=fisher)
    >>> updates.round(3)
    Array([-0.1, -0. ], dtype=float32)

    References:
      Kao et al., `Natural continual learning: success is a journey, not (just) a
      destination <https://arxiv.org/abs/2106.08085>`_, 2021.
    """
    damping = _number(
        "damping", damping, "a number above 0", lambda x: 0 < x < math.inf
    )
    decay = _number("decay", decay, "a number in [0, 1)", lambda x: 0 <= x < 1)

    def scale(update: jax.Array, relative: jax.Array) -> jax.Array:
        update = at_least_float32(update)
        dtype = update.real.dtype
        divisor = relative.astype(dtype) + jnp.asarray(damping, dtype)
        return update / divisor.astype(update.dtype)

    def init_fn(params: Any) -> ScaleByFisherState:
        del params
        zero = jnp.zeros([], jnp.float32)
        return ScaleByFisherState(jnp.zeros([], jnp.int32), zero)

    def update_fn(
        updates: Any, state: ScaleByFisherState, params: Any = None, **extra: Any
    ) -> tuple[Any, ScaleByFisherState]:
        del params
        held = extra.get("fisher") if fisher is None else fisher
        if held is None:
            raise ValueError(
                "scale_by_fisher needs fisher: give it as an argument, or call "
                "update(updates, state, params, fisher=...)"
            )
        held = match_fisher(held, "the updates", updates)
        # Of the steps before this one, so that no leaf has to wait for the others.
        d, past = jnp.asarray(decay, jnp.float32), state.steps.astype(jnp.float32)
        square = state.mean_square / jnp.where(past == 0, 1, 1 - d**past)
        # 0 as long as all updates were.
        unit = 1 / jnp.asarray(damping, jnp.float32)
        rms = jnp.where(square == 0, unit, jnp.sqrt(square))
        results: list[jax.Array] = []
        squares: dict[int, jax.Array] = {}
        size = 0
        leaves, treedef = jax.tree.flatten(updates)
        for leaf, relative in zip(leaves, relative_fisher(held), strict=True):
            scaled = scale(leaf, relative)
            square = jnp.sum(abs_square(scaled), axis=-1 if scaled.ndim else None)
            squares[len(squares)] = square.astype(jnp.float32)
            size += scaled.size
            scaled = scaled / rms.astype(scaled.dtype)
            results.append(scaled.astype(jnp.result_type(leaf)))
        # Without the barrier XLA sums each array of a stack by itself again.
        sums = (
            jnp.sum(lax.optimization_barrier(jnp.sum(stack, axis=range(1, stack.ndim))))
            for _, stack in stacks(squares)
        )
        new = sum(sums, jnp.zeros([], jnp.float32)) / max(1, size)
        mean_square = d * state.mean_square + (1 - d) * new
        steps = optax.safe_increment(state.steps)
        updates = jax.tree.unflatten(treedef, results)
        return updates, ScaleByFisherState(steps, mean_square)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _number(
    name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]
) -> float | jax.Array:
    """value as a float, or as it is where traced."""
    check_number(name, value, allowed)
    if isinstance(value, jax.core.Tracer):
        return value
    if not is_allowed(float(value)):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return float(value)
