"""The momentum filter around any Optax gradient transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mofo_jax._checks import (
    Alpha,
    Method,
    alpha_at,
    check_alpha,
    check_method,
    check_transformation,
)
from mofo_jax._leaves import (
    BlockAxesTree,
    FilterMask,
    cast_like,
    check_dtypes,
    first_moments,
    resolve_block_axes,
    resolve_mask,
)
from mofo_jax._scoring import Score, check_score, scores_of
from mofo_jax._selection.masks import no_guess, select_masks
from mofo_jax._selection.platforms import platform

# See momentum_filter.
Again = Callable[[Any, Any, Any, dict[str, Any], jax.Array], Any]


class FilterByMomentumState(NamedTuple):
    """State of :func:`filter_by_momentum`.

    Attributes:
      inner_state: State of the inner transformation, dense first moment included.
      step: int32 scalar, number of updates so far; schedules of alpha and random
        scores read it. Not named count, so that ``optax.tree.get(state, "count")``
        finds the inner one.
      threshold: int32 vector, for each block of the filtered leaves in order the bits
        of a magnitude that exactly the selected scores reach, ties aside (the upper 32
        bits of a float64), -1 before the first step. The next search starts there. Any
        value is valid: only the speed depends on it, never what is selected.
    """

    inner_state: optax.OptState
    step: jax.Array
    threshold: jax.Array


def filter_by_momentum(
    inner: optax.GradientTransformation,
    alpha: Alpha = 0.1,
    *,
    score: Score = "momentum",
    filter_mask: FilterMask = None,
    block_axes: BlockAxesTree = None,
    seed: jax.typing.ArrayLike = 0,
    method: Method = "search",
) -> optax.GradientTransformationExtraArgs:
    r"""Lets only the entries with the largest momentum move, in any optimizer.

    Runs ``inner`` as it is, on dense gradients with dense state, and sets its updates
    to zero wherever an entry is not among the ``alpha`` fraction of its block with
    the largest score:

    .. math::
      u_t \leftarrow u_t \odot \mathrm{top}_\alpha(|m_t|)

    In every block of n entries exactly ``k = min(n, max(1, floor(alpha * n)))`` are
    selected, see :func:`mofo_jax.top_fraction_mask` for the ranking and for ties. A
    block is a leaf unless ``block_axes`` splits it. What ``inner`` adds to an update,
    weight decay too, is filtered with it.

    Outside of :func:`jax.jit` a schedule of alpha is checked: by ``init`` for the first
    step, and by every ``update``. Inside, its values are not known and nothing can be
    raised. There the formula for k holds for any value: at 0 or below, and for NaN, one
    entry of each block is selected, and above 1 all are.

    A non-finite gradient goes through as in ``inner``. NaN ranks highest, so the
    entries it reaches are selected first, still exactly k of them; guard with
    :func:`optax.apply_if_finite`. A finite one above 1.8e19 passes that guard, but its
    square is infinite in float32: Adam never moves that entry again. Put
    :func:`optax.clip_by_global_norm` before the optimizer.

    Inside :func:`jax.shard_map` the blocks are global over automatic mesh axes and
    per shard over manual ones.

    Args:
      inner: The transformation whose updates are filtered. ``score="momentum"`` reads
        its first moment: a state field ``mu``, else ``trace``, ``ema`` or ``m``.
      alpha: Fraction of each block that moves, in (0, 1]: a number, a schedule of the
        step (from 0), or a scalar array, traced too.
      score: What ranks the entries, always by magnitude. ``"momentum"``, the first
        moment after this step (MoFO); ``"gradient"``, the incoming gradient;
        ``"update"``, inner's update (for Adam the paper's MV); ``"gain"``, the
        decrease of the loss, to first order, that the update brings, :math:`\max(0,
        -g_t \odot u_t)`; ``"random"``, a fresh draw per entry and step (exactly k of
        them, where the paper draws each entry on its own); or a function
        ``score(gradients, updates, inner_state, params)`` that returns a pytree of
        real or complex arrays shaped like the updates. With ``"gain"`` an entry that
        would climb never moves. So fewer than k may move, and even a scalar may stay;
        at alpha = 1 all entries that descend move. Gains are at least float32, and
        those below its smallest normal number, 1e-38, count as none. While they are
        ranked, the updates take up memory too, which :func:`mofo_jax.mofo` avoids.
      filter_mask: Which leaves are filtered, the others getting inner's whole update:
        a pytree of bools like the parameters, a prefix of it, or a function of the
        parameters that returns one, such as
        :func:`mofo_jax.all_but_norms_and_biases`. None filters all.
      block_axes: Axes along which every index is a block of its own: an int or tuple
        of ints for all leaves, a pytree of those (None for a whole leaf) like the
        parameters, or a function of the parameters that returns one. A plain tuple
        of ints is always axes, never a pytree.
      seed: Integer that random scores are drawn from.
      method: ``"search"``, or ``"top_k"`` for the reference by sorting, on one device.

    Returns:
      A transformation with a :class:`FilterByMomentumState`, whose shapes and dtypes
      stay those of init. Its updates have the parameters' dtypes where update is given
      the parameters, and inner's otherwise; an entry that is not selected gets zero
      (negative zero, which :func:`optax.apply_updates` adds to a parameter of -0.0
      without changing it).

    Raises:
      ValueError: alpha outside (0, 1], an unknown score or method; at init: a schedule
        of alpha begins outside, inner has no first moment, filter_mask or block_axes do
        not fit the parameters.
      TypeError: an argument of the wrong type; at init: parameters that are not
        floating or complex.

    >>> import jax.numpy as jnp, optax
    >>> from mofo_jax import filter_by_momentum
    >>> lion = optax.lion(0.5, weight_decay=0.0)
    >>> optimizer = filter_by_momentum(lion, alpha=0.5)
    >>> params = jnp.array([1.0, 2.0, 3.0, 4.0])
    >>> state = optimizer.init(params)
    >>> gradients = jnp.array([0.1, -4.0, 0.2, 3.0])
    >>> updates, state = optimizer.update(gradients, state, params)
    >>> optax.apply_updates(params, updates)
    Array([1. , 2.5, 3. , 3.5], dtype=float32)

    References:
      Chen et al., `MoFO: Momentum-Filtered Optimizer for Mitigating Forgetting in LLM
      Fine-Tuning <https://arxiv.org/abs/2407.20999>`_, 2024, Algorithm 1.
    """
    return momentum_filter(
        inner,
        alpha,
        score=score,
        filter_mask=filter_mask,
        block_axes=block_axes,
        seed=seed,
        method=method,
        subtracted=False,
    )


def momentum_filter(
    inner: optax.GradientTransformation,
    alpha: Alpha,
    *,
    filter_mask: FilterMask,
    block_axes: BlockAxesTree,
    subtracted: bool,
    score: Score = "momentum",
    seed: jax.typing.ArrayLike = 0,
    method: Method = "search",
    again: Again | None = None,
) -> optax.GradientTransformationExtraArgs:
    """:func:`filter_by_momentum`, also of updates that are subtracted afterwards.

    Added to a parameter of -0.0, only an update of -0.0 gives it back. What goes
    through a negative learning rate afterwards has to start from 0.0 for that.

    With ``again`` the updates need not be stored while gains are ranked. It computes
    the updates once more, from inner's new state. It takes inner's new and old state,
    the parameters, the extra arguments, and an int32 0 that depends on the search and
    that what it computes has to depend on.
    """
    unselected = 0.0 if subtracted else -0.0
    check_transformation("inner", inner)
    if not callable(alpha):
        check_alpha(alpha)
    check_score(score, seed)
    check_method(method)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> FilterByMomentumState:
        state = inner.init(params)
        state = cast_like(state, state)  # no dtype is weak, as none is after a step
        shapes, axes = [], []
        # Optax also calls init with a placeholder that has no leaves.
        if leaves := jax.tree.leaves(params):
            check_dtypes(params)
            filtered = resolve_mask(params, filter_mask)
            shapes = _where(filtered, [jnp.shape(leaf) for leaf in leaves])
            axes = _where(filtered, resolve_block_axes(params, block_axes))
            if score == "momentum":
                first_moments(state, params, filtered)
        step = jnp.zeros([], jnp.int32)
        if callable(alpha):
            with jax.numpy_dtype_promotion("standard"):
                alpha_at(alpha, step)
        return FilterByMomentumState(state, step, no_guess(shapes, axes))

    def update_fn(
        updates: Any, state: FilterByMomentumState, params: Any = None, **extra: Any
    ) -> tuple[Any, FilterByMomentumState]:
        gradients, step = updates, state.step
        # Optax mixes dtypes (decay**count), which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            fraction = alpha_at(alpha, step)
            updates, inner_state = inner.update(
                gradients, state.inner_state, params, **extra
            )
        # Gradients or hyperparameters of another precision than the parameters'
        # would otherwise change the state's dtypes, and so recompile the next step.
        inner_state = cast_like(inner_state, state.inner_state)
        if params is not None:
            updates = cast_like(updates, params)
        # Of the updates, as params may not be given: only shapes and names matter.
        filtered = resolve_mask(updates, filter_mask)
        axes = resolve_block_axes(updates, block_axes)
        scores = scores_of(
            score,
            filtered,
            *(gradients, updates, inner_state, params),
            seed=seed,
            step=step,
            subtracted=subtracted,
        )
        scores = _where(filtered, scores)
        if score == "gain":
            scores = [_stored(gain, step) for gain in scores]
        masks, threshold = select_masks(
            scores, fraction, _where(filtered, axes), method, state.threshold
        )
        if score == "gain":
            masks = [m & (gain != 0) for m, gain in zip(masks, scores, strict=True)]
            if again is not None:
                # No threshold is below -1, so this is 0. As XLA does not know that, it
                # neither keeps the updates from above nor computes these too early.
                zero = jnp.any(threshold < -1).astype(jnp.int32)
                with jax.numpy_dtype_promotion("standard"):
                    updates = again(inner_state, state.inner_state, params, extra, zero)
                if params is not None:
                    updates = cast_like(updates, params)
        leaves, treedef = jax.tree.flatten(updates)
        rest = iter(masks)
        kept = [
            _keep(u, next(rest), unselected) if f else u
            for u, f in zip(leaves, filtered, strict=True)
        ]
        updates = jax.tree.unflatten(treedef, kept)
        step = optax.safe_increment(step)
        return updates, FilterByMomentumState(inner_state, step, threshold)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stored(gain: jax.Array, step: jax.Array) -> jax.Array:
    """The same, kept by XLA from here on instead of gradients and updates.

    Otherwise XLA computes gains again where they are compared with the thresholds.
    """
    if (on := platform()) == "tpu":
        return gain  # the search does it, after a first count
    if on != "cpu":
        stored: jax.Array = lax.optimization_barrier(gain)
        return stored
    # There XLA removes barriers early. It does not know that this loop never runs, and
    # passes the gain through it without a copy.
    _, stored = lax.while_loop(
        lambda carry: carry[0] < 0, lambda carry: (carry[0], -carry[1]), (step, gain)
    )
    return stored


def _where(filtered: list[bool], values: list[Any]) -> list[Any]:
    """The values of the leaves that are filtered."""
    return [value for f, value in zip(filtered, values, strict=True) if f]


def _keep(update: jax.Array, mask: jax.Array, unselected: complex) -> jax.Array:
    if jnp.iscomplexobj(update):
        unselected = complex(unselected, unselected)
    return lax.select(mask, update, jnp.full_like(update, unselected))
