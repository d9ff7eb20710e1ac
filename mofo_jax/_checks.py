"""What arguments are allowed; errors name the argument, its value and what is."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Method = Literal["search", "top_k"]
Alpha = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]
BlockAxes = int | Sequence[int] | None


def check_alpha(alpha: Any) -> None:
    """Raises unless alpha is a number in (0, 1] or a scalar array of one."""
    if isinstance(alpha, jax.Array | np.ndarray) and alpha.dtype != object:
        real = (jnp.floating, jnp.integer)
        if alpha.ndim or not any(jnp.issubdtype(alpha.dtype, kind) for kind in real):
            raise TypeError(
                "alpha as an array must be a real scalar, "
                f"got {alpha.dtype.name}{list(alpha.shape)}"
            )
        if isinstance(alpha, jax.core.Tracer):
            return
        alpha = float(alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"alpha must be a number in (0, 1], got {alpha!r}")
    if not 0 < float(alpha) <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha!r}")


def alpha_at(alpha: Alpha, step: jax.Array) -> jax.typing.ArrayLike:
    """alpha, or what its schedule gives for a step, checked where it is known."""
    if not callable(alpha):
        return alpha
    fraction = alpha(step)
    try:
        check_alpha(fraction)
    except ValueError as error:
        known = not isinstance(step, jax.core.Tracer)
        when = f" at step {step}" if known else ""
        raise ValueError(f"{error} from its schedule{when}") from None
    return fraction


def check_number(name: str, value: Any, allowed: str = "a number") -> None:
    """Raises unless value is a real number or a scalar array."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_scalar = isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
    if not is_number and not (is_scalar and value.dtype.kind not in "OSU"):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")


def at_least_float32(x: jax.Array) -> jax.Array:
    """x, raised to float32 if an integer or of lower precision."""
    if not is_rankable(x.dtype) or jnp.finfo(x.dtype).bits < 32:
        return x.astype(jnp.float32)
    return x


def is_rankable(dtype: jax.typing.DTypeLike) -> bool:
    """Whether magnitudes of the dtype can be ranked: floats of 16 bits up, complex.

    Some formats of 8 bits and less have no sign bit, or a NaN below infinity.
    """
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and jnp.dtype(dtype).itemsize >= 2


def check_transformation(
    name: str, value: Any, allowed: str = "a gradient transformation"
) -> None:
    """Raises TypeError unless value has what an Optax transformation has."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")


def check_method(method: Any) -> None:
    """Raises unless the method is one of :func:`top_fraction_mask`'s."""
    if method not in ("search", "top_k"):
        raise ValueError(f'method must be "search" or "top_k", got {method!r}')


def normalize_block_axes(
    block_axes: BlockAxes, shape: tuple[int, ...], name: str = "x"
) -> tuple[int, ...]:
    """Returns block axes as sorted non-negative integers.

    ``name`` is what the error calls the array: a parameter's path, say.
    """
    if block_axes is None:
        return ()
    axes: Any = block_axes
    if isinstance(axes, numbers.Integral):
        axes = (axes,)
    if not (
        isinstance(axes, Sequence)
        and all(isinstance(a, numbers.Integral) for a in axes)
        and not any(isinstance(a, bool) for a in axes)
    ):
        raise TypeError(
            f"block_axes must be an int, a sequence of ints or None, got "
            f"{block_axes!r} (under optax.inject_hyperparams list it in static_args)"
        )
    ndim = len(shape)
    if not all(-ndim <= a < ndim for a in axes):
        raise ValueError(
            f"block_axes {block_axes!r} out of range for {name} of shape "
            f"{tuple(shape)}: allowed are {-ndim} to {ndim - 1}"
            if ndim
            else f"block_axes {block_axes!r} given for {name}, which is a scalar"
        )
    normalized = tuple(sorted(int(a) % ndim for a in axes))
    if len(set(normalized)) != len(normalized):
        raise ValueError(f"block_axes {block_axes!r} repeats an axis of {name}")
    return normalized
