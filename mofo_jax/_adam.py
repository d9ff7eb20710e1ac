"""Adam under the filter, whose updates can be computed from its moments alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mofo_jax._checks import Alpha, check_number, check_transformation, is_rankable
from mofo_jax._filter import momentum_filter
from mofo_jax._leaves import BlockAxesTree, FilterMask
from mofo_jax._scoring import Score


class Adam(NamedTuple):
    """The arguments of :func:`optax.scale_by_adam`."""

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    eps_root: jax.typing.ArrayLike
    mu_dtype: jax.typing.DTypeLike | None
    nesterov: bool

    def transformation(self) -> optax.GradientTransformation:
        """Adam itself, of checked arguments."""
        for name in ("b1", "b2", "eps", "eps_root"):
            check_number(name, getattr(self, name))
        try:
            floating = self.mu_dtype is None or is_rankable(jnp.dtype(self.mu_dtype))
        except TypeError:
            floating = False
        if not floating:
            raise TypeError(
                "mu_dtype must be a floating dtype of 16 bits or more, got "
                f"{self.mu_dtype!r}"
            )
        return optax.scale_by_adam(**self._asdict())

    def direction(self, state: optax.ScaleByAdamState, zero: jax.Array) -> Any:
        """The updates of the step that left this state, without Nesterov momentum.

        The first moment is as it is stored, which may be of a lower precision. ``zero``
        is added to the count, see :func:`mofo_jax._filter.momentum_filter`.
        """
        mu = jax.tree.map(
            lambda m, v: m.astype(jnp.promote_types(m.dtype, v.dtype)),
            state.mu,
            state.nu,
        )
        count = state.count + zero
        mu = optax.tree.bias_correction(mu, self.b1, count)
        nu = optax.tree.bias_correction(state.nu, self.b2, count)
        # Of complex numbers, Optax stores the squared magnitudes as complex ones.
        return jax.tree.map(
            lambda m, v: m / (jnp.sqrt(jnp.real(v) + self.eps_root) + self.eps), mu, nu
        )


def filtered_adam(
    adam: Adam,
    precondition: optax.GradientTransformation | None,
    alpha: Alpha,
    *,
    score: Score,
    filter_mask: FilterMask,
    block_axes: BlockAxesTree,
    decay: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The filter around Adam, a precondition and a decay, before the sign is turned.

    Raises:
      TypeError, ValueError: As :func:`mofo_jax.mofo`.
    """
    if precondition is not None:
        allowed = "a gradient transformation or None"
        check_transformation("precondition", precondition, allowed)
    after = [
        optax.with_extra_args_support(x) for x in (precondition, decay) if x is not None
    ]
    inner = adam.transformation()

    def again(
        new: Any, old: Any, params: Any, extra: dict[str, Any], zero: jax.Array
    ) -> Any:
        if not after:
            return adam.direction(new, zero)
        updates = adam.direction(new[0], zero)
        for transformation, before in zip(after, old[1:], strict=True):
            updates, _ = transformation.update(updates, before, params, **extra)
        return updates

    return momentum_filter(
        optax.chain(inner, *after) if after else inner,
        alpha,
        score=score,
        filter_mask=filter_mask,
        block_axes=block_axes,
        subtracted=True,
        # Nesterov momentum needs the gradients too.
        again=None if adam.nesterov else again,
    )
