"""MoFO: the momentum filter around Adam."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mofo_jax.filter import Alpha, momentum_filter
from mofo_jax.leaves import BlockAxesTree, FilterMask


def scale_by_mofo(
    alpha: Alpha = 0.1,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    filter_mask: FilterMask = None,
    block_axes: BlockAxesTree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, for the entries with the largest momentum only.

    See :func:`mofo_jax.mofo` for the formula and the arguments. This is
    :func:`mofo_jax.filter_by_momentum` around :func:`optax.scale_by_adam`.

    Returns:
      A transformation whose state is a :class:`mofo_jax.FilterByMomentumState` around
      an ``optax.ScaleByAdamState`` with ``count``, ``mu`` and ``nu``.

    Raises:
      ValueError, TypeError: see :func:`mofo_jax.filter_by_momentum`.
    """
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    # The learning rate's sign, applied later, makes this the negative zero that
    # leaves every parameter as it is.
    return momentum_filter(
        adam,
        alpha,
        filter_mask=filter_mask,
        block_axes=block_axes,
        unselected=0.0,
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

    Args:
      learning_rate: A number, a schedule, or None to leave the updates unscaled.
      alpha: Fraction of each block that moves, in (0, 1]: a number, a schedule of the
        step, or a scalar array (:func:`optax.inject_hyperparams`).
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Added to the denominator outside of the root.
      eps_root: Added inside the root.
      mu_dtype: Dtype of the first moment; None takes the parameters'.
      weight_decay: Decoupled decay as in :func:`optax.adamw`. As in the released
        code it is dense: it moves *every* entry, also those that the filter holds.
      mask: Which leaves decay, as in :func:`optax.adamw`.
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
        masks or axes that do not fit the parameters, and integer parameters.

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
    _check_rate("learning_rate", learning_rate, optional=True)
    _check_rate("weight_decay", weight_decay)
    # A decay of a plain 0 is left out: 0 times a parameter would still be computed.
    decays = not (isinstance(weight_decay, numbers.Real) and weight_decay == 0)
    decay = (
        optax.add_decayed_weights(weight_decay, mask) if decays else optax.identity()
    )
    adam = (b1, b2, eps, eps_root, mu_dtype)
    if decay_selected_only:
        inner = optax.chain(optax.scale_by_adam(*adam, nesterov=nesterov), decay)
        decay = optax.identity()
        filtered = momentum_filter(
            inner,
            alpha,
            filter_mask=filter_mask,
            block_axes=block_axes,
            unselected=0.0,
        )
    else:
        filtered = scale_by_mofo(
            alpha,
            *adam,
            nesterov=nesterov,
            filter_mask=filter_mask,
            block_axes=block_axes,
        )
    if learning_rate is None and not decays:
        return filtered
    return optax.chain(filtered, decay, optax.scale_by_learning_rate(learning_rate))


def _check_rate(name: str, rate: Any, optional: bool = False) -> None:
    """Raises unless rate is a number, a scalar array or a schedule."""
    if callable(rate) or (optional and rate is None):
        return
    is_number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
    is_array = isinstance(rate, jax.Array | np.ndarray) and jnp.ndim(rate) == 0
    if not (is_number or is_array):
        allowed = "a number or a schedule" + (" or None" if optional else "")
        raise TypeError(f"{name} must be {allowed}, got {rate!r}")
