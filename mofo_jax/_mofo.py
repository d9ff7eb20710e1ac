"""MoFO: the momentum filter around Adam."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import optax

from mofo_jax._adam import Adam, filtered_adam
from mofo_jax._checks import Alpha, check_number
from mofo_jax._leaves import BlockAxesTree, FilterMask, cast_like
from mofo_jax._scoring import Score


def scale_by_mofo(
    alpha: Alpha = 0.1,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    score: Score = "momentum",
    precondition: optax.GradientTransformation | None = None,
    nesterov: bool = False,
    filter_mask: FilterMask = None,
    block_axes: BlockAxesTree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, for the entries with the largest momentum only.

    See :func:`mofo_jax.mofo` for the formula. This is
    :func:`mofo_jax.filter_by_momentum` around :func:`optax.scale_by_adam`.

    Args:
      alpha: Fraction of each block that moves, in (0, 1]: a number, a schedule of the
        step, or a scalar array. See :func:`mofo_jax.filter_by_momentum` for a schedule
        that leaves the range.
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Added to the denominator outside of the root.
      eps_root: Added inside the root.
      mu_dtype: Floating dtype of the first moment; None takes the parameters'.
      score: What ranks the entries, see :func:`mofo_jax.filter_by_momentum`. The
        published algorithm ranks by ``"momentum"``; ``"gain"`` ranks by the decrease of
        the loss that the step brings, to first order, and moves only what descends.
      precondition: A transformation of Adam's direction before it is filtered, such as
        :func:`mofo_jax.continual.scale_by_fisher`. It gets the extra arguments of
        ``update``.
      nesterov: Whether to use Nesterov momentum.
      filter_mask: Which leaves are filtered, see :func:`mofo_jax.filter_by_momentum`.
      block_axes: How leaves are split into blocks, see there.

    Returns:
      A transformation whose state is a :class:`mofo_jax.FilterByMomentumState` around
      an ``optax.ScaleByAdamState`` with ``count``, ``mu`` and ``nu``.

    Raises:
      ValueError, TypeError: see :func:`mofo_jax.filter_by_momentum`.

    >>> import jax.numpy as jnp
    >>> from mofo_jax import scale_by_mofo
    >>> transformation = scale_by_mofo(alpha=0.5)
    >>> state = transformation.init(jnp.zeros(4))
    >>> updates, state = transformation.update(jnp.array([1.0, -3.0, 2.0, -4.0]), state)
    >>> updates.round(3)
    Array([ 0., -1.,  0., -1.], dtype=float32)
    """
    return filtered_adam(
        Adam(b1, b2, eps, eps_root, mu_dtype, nesterov),
        precondition,
        alpha,
        score=score,
        filter_mask=filter_mask,
        block_axes=block_axes,
    )


def mofo(
    learning_rate: optax.ScalarOrSchedule | None = None,
    alpha: Alpha = 0.1,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    score: Score = "momentum",
    precondition: optax.GradientTransformation | None = None,
    nesterov: bool = False,
    filter_mask: FilterMask = None,
    block_axes: BlockAxesTree = None,
    decay_selected_only: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""The Momentum-Filtered Optimizer.

    Adam that in every step moves, in every parameter block, only the ``alpha``
    fraction of entries with the largest momentum. Fine-tuned with it, a model stays
    closer to the pretrained weights and forgets less. With Adam's moments, dense and
    updated for every entry,

    .. math::
      \begin{align*}
        m_t &\leftarrow \beta_1 m_{t-1} + (1-\beta_1) g_t \\
        v_t &\leftarrow \beta_2 v_{t-1} + (1-\beta_2) {g_t}^2 \\
        u_t &\leftarrow \hat{m}_t / (\sqrt{\hat{v}_t + \bar{\varepsilon}}
          + \varepsilon) \\
        \theta_t &\leftarrow \theta_{t-1} - \eta_t \left(u_t \odot
          \mathrm{top}_\alpha(|m_t|) + \lambda \theta_{t-1}\right)
      \end{align*}

    where :math:`\mathrm{top}_\alpha` is 1 for exactly
    ``k = min(n, max(1, floor(alpha * n)))`` of a block's n entries and 0 elsewhere
    (see :func:`mofo_jax.top_fraction_mask`). The ranking is by the raw first moment
    as the state stores it. ``alpha=1`` is Adam bit for bit. Scalars always move.

    Without a learning rate this is :func:`mofo_jax.scale_by_mofo`, for use as
    ``optax.chain(mofo(alpha=0.1), optax.scale_by_learning_rate(lr))``.

    Under :func:`optax.inject_hyperparams`, list ``filter_mask`` and ``block_axes`` in
    ``static_args`` where they are given. The injected alpha is an array: the product
    ``alpha * n`` is then rounded in its precision (float32, say) before the floor, so
    that k may differ by one. With bfloat16 parameters pass
    ``hyperparam_dtype=jnp.float32``, or b2 = 0.999 becomes 1.

    Args:
      learning_rate: A number, a schedule, or None to leave the updates unscaled.
      alpha: Fraction of each block that moves, in (0, 1]: a number, a schedule of the
        step, or a scalar array (:func:`optax.inject_hyperparams`). See
        :func:`mofo_jax.filter_by_momentum` for a schedule that leaves the range.
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Added to the denominator outside of the root.
      eps_root: Added inside the root.
      mu_dtype: Floating dtype of the first moment; None takes the parameters'.
      weight_decay: Decoupled decay as in :func:`optax.adamw`. As in the released
        code it is dense: it moves *every* entry, also those that the filter holds.
      mask: Which leaves decay, as in :func:`optax.adamw`.
      score: What ranks the entries, see :func:`mofo_jax.filter_by_momentum`. The
        published algorithm ranks by ``"momentum"``; ``"gain"`` ranks by the decrease of
        the loss that the step brings, to first order, and moves only what descends.
      precondition: A transformation of Adam's direction before it is filtered, such as
        :func:`mofo_jax.continual.scale_by_fisher`. It gets the extra arguments of
        ``update``.
      nesterov: Whether to use Nesterov momentum.
      filter_mask: Which leaves are filtered, see :func:`mofo_jax.filter_by_momentum`.
      block_axes: How leaves are split into blocks, see there.
      decay_selected_only: Whether weight decay, too, moves only the selected entries.

    Returns:
      A transformation whose updates are ready for :func:`optax.apply_updates` if a
      learning rate is given. ``optax.tree.get`` finds ``mu`` and ``nu`` (and, unless
      a schedule adds a second one, ``count``) in its state.

    Raises:
      ValueError, TypeError: a bad argument, named with what is allowed; at init also
        a schedule of alpha that begins outside (0, 1], masks or axes that do not fit
        the parameters, and integer parameters.

    >>> import jax, jax.numpy as jnp, optax
    >>> from mofo_jax import mofo
    >>> optimizer = mofo(learning_rate=0.1, alpha=0.25)
    >>> params = jnp.array([1.0, 2.0, 3.0, 4.0])
    >>> state = optimizer.init(params)
    >>> gradients = jax.grad(lambda x: jnp.sum(x**2))(params)
    >>> updates, state = optimizer.update(gradients, state, params)
    >>> optax.apply_updates(params, updates) != params
    Array([False, False, False,  True], dtype=bool)

    References:
      Chen et al., `MoFO: Momentum-Filtered Optimizer for Mitigating Forgetting in LLM
      Fine-Tuning <https://arxiv.org/abs/2407.20999>`_, 2024, Algorithm 1.
    """
    if learning_rate is not None and not callable(learning_rate):
        check_number("learning_rate", learning_rate, "a number, a schedule or None")
    if not callable(weight_decay):
        check_number("weight_decay", weight_decay, "a number or a schedule")
    # A decay of a plain 0 is left out: 0 times a parameter would still be computed.
    decays = not (isinstance(weight_decay, numbers.Real) and weight_decay == 0)
    decay = (
        optax.add_decayed_weights(weight_decay, mask) if decays else optax.identity()
    )
    inside, outside = None, decay
    if decay_selected_only:
        inside, outside = decay, optax.identity()
    filtered = filtered_adam(
        Adam(b1, b2, eps, eps_root, mu_dtype, nesterov),
        precondition,
        alpha,
        score=score,
        filter_mask=filter_mask,
        block_axes=block_axes,
        decay=inside,
    )
    if learning_rate is None and not decays:
        return filtered
    return optax.chain(
        filtered,
        outside,
        optax.scale_by_learning_rate(learning_rate),
        _in_the_parameters_dtypes(),
    )


def _in_the_parameters_dtypes() -> optax.GradientTransformation:
    """Undoes what a learning rate of higher precision did to the updates' dtypes."""

    def update(updates: Any, params: Any) -> Any:
        return updates if params is None else cast_like(updates, params)

    return optax.stateless(update)
