"""Gradient episodic memory (GEM): no step that makes an earlier task worse."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mofo_jax._checks import at_least_float32
from mofo_jax._leaves import check_same_shapes

# Of the mean of the diagonal, added to it: with memories that depend on each other the
# programme has many solutions, and the same gradient.
_RIDGE = 1e-6


def project_gradient(
    gradient: Any,
    memories: Sequence[Any],
    *,
    margin: float = 0.0,
    per_tensor: bool = False,
) -> Any:
    r"""The gradient nearest to ``gradient`` that opposes none of ``memories``.

    With the rows of G the memories, the gradients of earlier tasks, it is
    :math:`g + G^T v`, where v solves the dual quadratic programme

    .. math::
      \min_{v \ge \gamma} \tfrac12 v^T G G^T v + (G g)^T v.

    With margin 0 its products with all memories are 0 or above. A larger margin moves
    it further toward them. A gradient that opposes none of them comes back as it is,
    bit for bit, whatever the margin.

    Only products of whole gradients are ever formed, so leaves keep their shardings,
    and what devices exchange is a number for each pair of gradients and leaf. The
    programme is solved exactly, by principal pivoting (Murty 1974), in as many steps as
    constraints become active.

    Args:
      gradient: Pytree of real arrays, of the current task.
      memories: Pytrees like it, one for each earlier task; any number of them.
      margin: The least v, :math:`\gamma`, 0 or above; in the published code, and in
        TRACE's, 0.5.
      per_tensor: Whether each leaf is projected by itself, rather than all as one
        vector. Then no leaf opposes a memory's.

    Returns:
      Pytree like ``gradient``, of its dtypes. Products are in float32 or wider.

    Raises:
      ValueError: margin below 0 or not finite, or trees of different shapes.

    >>> import jax.numpy as jnp
    >>> from mofo_jax.continual import project_gradient
    >>> projected = project_gradient(jnp.array([2.0, -2.0]), [jnp.array([0.0, 1.0])])
    >>> jnp.abs(projected).round(3)
    Array([2., 0.], dtype=float32)

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, 2017, equations 10 to 12.
    """
    if not isinstance(margin, numbers.Real) or not 0 <= margin < math.inf:
        raise ValueError(f"margin must be a number, 0 or above, got {margin!r}")
    for i, memory in enumerate(memories):
        check_same_shapes(f"memories[{i}]", memory, "gradient", gradient)
    if not memories:
        return gradient
    trees = [jax.tree.leaves(tree) for tree in (*memories, gradient)]
    count = len(memories)
    # Of each leaf, its products with all memories: [leaves, T, T + 1].
    products = jnp.stack(
        [
            jnp.stack([jnp.stack([_dot(m, x) for x in leaf]) for m in leaf[:count]])
            for leaf in zip(*trees, strict=True)
        ]
    )
    if not per_tensor:
        products = jnp.sum(products, axis=0, keepdims=True)
    v = jax.vmap(lambda p: _solve(p[:, :count], p[:, count], margin))(products)
    v = jnp.broadcast_to(v, (len(trees[0]), count))

    def project(i: int, g: jax.Array, leaf: Sequence[jax.Array]) -> jax.Array:
        moved = g.astype(v.dtype)
        for weight, memory in zip(v[i], leaf, strict=True):
            moved += weight * memory.astype(v.dtype)
        return moved.astype(g.dtype)

    leaves = [
        project(i, leaf[count], leaf[:count])
        for i, leaf in enumerate(zip(*trees, strict=True))
    ]
    return jax.tree.unflatten(jax.tree.structure(gradient), leaves)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(at_least_float32(a) * at_least_float32(b))


def _solve(gram: jax.Array, against: jax.Array, margin: float) -> jax.Array:
    """v of [T]: zeros where no entry of `against` [T] is below zero."""
    count = len(against)
    # In units in which each memory has length 1, so that the ridge suits all of them.
    lengths = jnp.sqrt(jnp.diagonal(gram))
    units = jnp.where(lengths > 0, 1 / lengths, 0)
    matrix = gram * units[:, None] * units[None] + _RIDGE * jnp.eye(count)
    matrix += jnp.diag(jnp.where(lengths > 0, 0.0, 1.0).astype(gram.dtype))
    # Around the least v: u = (v - margin) * lengths, 0 or above.
    target = units * (against + margin * jnp.sum(gram, axis=1))
    u = _complementary(matrix, target)
    v = jnp.where(lengths > 0, units * u + margin, 0)
    return jnp.where(jnp.any(against < 0), v, 0)


def _complementary(matrix: jax.Array, target: jax.Array) -> jax.Array:
    """u >= 0 with w = matrix u + target >= 0 and u w = 0; the matrix is definite.

    Murty's rule: exchange the last row that is wrong, until none is. It ends for every
    definite matrix, and needs no more exchanges than there are sets of rows.
    """
    count = len(target)
    eye = jnp.eye(count, dtype=matrix.dtype)
    tolerance = 1e-6 * jnp.max(jnp.abs(target))

    def solved(active: jax.Array) -> tuple[jax.Array, jax.Array]:
        """u of these active rows, and which rows are wrong then."""
        system = jnp.where(active[:, None] & active[None], matrix, eye)
        u = jnp.linalg.solve(system, jnp.where(active, -target, 0))
        w = matrix @ u + target
        return u, jnp.where(active, u, w) < -tolerance

    def exchange(carry: Any) -> Any:
        step, active, _, wrong = carry
        last = count - 1 - jnp.argmax(wrong[::-1])
        active ^= jnp.arange(count) == last
        return step + 1, active, *solved(active)

    def unsolved(carry: Any) -> jax.Array:
        step, _, _, wrong = carry
        # Rounding could make it cycle.
        going_on: jax.Array = (step < 100 * count) & jnp.any(wrong)
        return going_on

    none = jnp.zeros(count, bool)
    *_, u, _ = lax.while_loop(unsolved, exchange, (jnp.int32(0), none, *solved(none)))
    solution: jax.Array = jnp.maximum(u, 0)
    return solution
