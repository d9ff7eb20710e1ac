"""Measures of how far training went and of what is left to do."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mofo_jax._checks import at_least_float32, check_alpha
from mofo_jax._leaves import (
    BlockAxesTree,
    check_dtypes,
    check_same_shapes,
    resolve_block_axes,
)
from mofo_jax._selection.masks import select_masks


def distance(params: Any, reference: Any) -> jax.Array:
    """Euclidean distance of all parameters from reference ones, as one vector.

    The paper's measure of how far fine-tuning moved (section 2).

    Args:
      params: Pytree of arrays.
      reference: Pytree of the same structure and shapes.

    Returns:
      Scalar, float32 for parameters of lower precision, which are raised first.

    Raises:
      ValueError: The structures or shapes differ.

    >>> import jax.numpy as jnp
    >>> from mofo_jax import distance
    >>> distance({"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([0.0, 5.0])})
    Array(5., dtype=float32)
    """
    check_same_shapes("reference", reference, "params", params)
    difference = jax.tree.map(
        lambda a, b: at_least_float32(a) - at_least_float32(b), params, reference
    )
    norm: jax.Array = optax.tree.norm(difference)
    return norm


def top_fraction_norm(
    gradients: Any, alpha: jax.typing.ArrayLike, *, block_axes: BlockAxesTree = None
) -> jax.Array:
    r"""The L1,top-alpha norm, in which the paper states MoFO's convergence.

    .. math::
      \|g\|_{1,\mathrm{top}\text{-}\alpha} =
        \sum_b \| g_b \odot \mathrm{top}_\alpha(|g_b|) \|_1

    over all blocks b: what the entries that a filter by gradient magnitude would
    move still contribute.

    Args:
      gradients: Pytree of arrays.
      alpha: Fraction in (0, 1].
      block_axes: As in :func:`mofo_jax.filter_by_momentum`.

    Returns:
      Scalar, float32 for gradients of lower precision.

    Raises:
      ValueError, TypeError: alpha or block_axes as in
        :func:`mofo_jax.top_fraction_mask`.

    >>> import jax.numpy as jnp
    >>> from mofo_jax import top_fraction_norm
    >>> top_fraction_norm({"a": jnp.array([1.0, -3.0]), "b": jnp.array([2.0])}, 0.5)
    Array(5., dtype=float32)

    References:
      Chen et al., `MoFO <https://arxiv.org/abs/2407.20999>`_, convergence analysis.
    """
    check_alpha(alpha)
    check_dtypes(gradients)
    leaves = jax.tree.leaves(gradients)
    axes = resolve_block_axes(gradients, block_axes)
    masks, _ = select_masks(leaves, alpha, axes)
    sums = [
        jnp.sum(jnp.where(mask, jnp.abs(at_least_float32(g)), 0))
        for g, mask in zip(leaves, masks, strict=True)
    ]
    total: jax.Array = optax.tree.sum(sums)
    return total
