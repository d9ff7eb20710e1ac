"""The diagonal of the Fisher information, dense or in factors."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mofo_jax._checks import at_least_float32
from mofo_jax._leaves import check_same_shapes, leaf_names


class FactoredFisher(NamedTuple):
    """The Fisher information of one leaf of two or more axes, in two factors.

    As Adafactor stores a second moment. The entry in row i and column j of the last
    two axes is ``rows[i] * columns[j] / mean(rows)``, which is exact where the dense
    leaf has rank one. The axes before them, such as that of stacked layers, are
    factored one by one. The mean over the leaf is always exact.

    Attributes:
      rows: [..., n], the means over the last axis.
      columns: [..., m], the means over the axis before it.
    """

    rows: jax.typing.ArrayLike
    columns: jax.typing.ArrayLike


def fisher_diagonal(
    gradient: Callable[[Any, Any], Any],
    params: Any,
    examples: Iterable[Any],
    *,
    factored: bool = False,
) -> Any:
    """The diagonal of the empirical Fisher information: the mean squared gradient.

    On examples that the model itself draws, see :func:`draw_texts`, it estimates the
    Fisher information proper, and needs no pretraining data.

    Args:
      gradient: A function of parameters and one example that returns the gradient of
        the example's negative log-likelihood, or of :func:`fisher_probe`, a pytree like
        the parameters. Jit it.
        With a batch's mean in place of an example the result is smaller, by the
        batch's size where gradients are independent.
      params: Pytree of arrays.
      examples: One or more, taken one at a time, so an iterator that makes each when it
        is asked for will do.
      factored: Whether leaves of two or more axes are stored as a
        :class:`FactoredFisher`. For a matrix [n, m] that is n + m numbers; the dense
        sums are never stored. Leaves of fewer axes stay dense.

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
    >>> example = jnp.array([[1.0, 2.0], [2.0, 4.0]])
    >>> fisher = fisher_diagonal(gradient, jnp.zeros((2, 2)), [example], factored=True)
    >>> fisher.rows, fisher.columns
    (Array([ 2.5, 10. ], dtype=float32), Array([ 2.5, 10. ], dtype=float32))

    References:
      Kirkpatrick et al., `Overcoming catastrophic forgetting in neural networks
      <https://arxiv.org/abs/1612.00796>`_, 2017; Kunstner et al., `Limitations of the
      Empirical Fisher Approximation <https://arxiv.org/abs/1905.12558>`_, 2019; Shazeer
      and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018 (the factors).
    """
    total, count = None, 0
    squares_of = _factored_squares if factored else _squares
    for example in examples:
        squares = squares_of(gradient(params, example))
        total = squares if total is None else _add(total, squares)
        count += 1
    if total is None:
        raise ValueError("examples must be one or more, got none")
    return jax.tree.map(lambda x: x / count, total)


def fisher_probe(
    logits: jax.Array, key: jax.Array, mask: jax.typing.ArrayLike = True
) -> jax.Array:
    r"""A scalar whose gradient, squared, estimates the Fisher information.

    To be differentiated in place of a negative log-likelihood, in the ``gradient`` of
    :func:`fisher_diagonal`. The mean over keys is the Fisher information of the
    predictions at all positions, as it is for answers that the model draws. But where
    the model is sure, drawn answers hardly vary: nearly all gradients are small, and a
    few unlikely answers decide everything. Here no answer is drawn. With random signs
    s, :math:`\langle z, w \rangle` is returned for the logits z, where

    .. math::
      w = \sqrt{p} \odot s - p \langle \sqrt{p}, s \rangle, \qquad
      \mathrm{E}[w w^\top] = \mathrm{diag}(p) - p p^\top

    so that every possible answer has its part in each estimate. No gradient goes
    through w.

    Args:
      logits: Floating, [..., V].
      key: From ``jax.random.key``, another one for each example.
      mask: Which positions count, bool of a shape that broadcasts to [...].

    Returns:
      A float32 scalar (or wider where logits are).

    >>> import jax, jax.numpy as jnp
    >>> from mofo_jax.continual import fisher_diagonal, fisher_probe
    >>> gradient = jax.jit(jax.grad(fisher_probe))
    >>> keys = jax.random.split(jax.random.key(0), 500)
    >>> logits = jnp.log(jnp.array([0.98, 0.01, 0.01]))  # of one position
    >>> fisher = fisher_diagonal(gradient, logits, keys)
    >>> jnp.allclose(fisher, jnp.array([0.0196, 0.0099, 0.0099]), rtol=0.1)  # p (1 - p)
    Array(True, dtype=bool)

    References:
      Dangel et al., `BackPACK: Packing more into Backprop
      <https://arxiv.org/abs/1912.10985>`_, 2020 (the square root of the Hessian);
      Hutchinson, `A stochastic estimator of the trace of the influence matrix
      <https://doi.org/10.1080/03610918908812806>`_, 1989 (the signs).
    """
    logits = at_least_float32(logits)
    p = lax.stop_gradient(jax.nn.softmax(logits))
    root = jnp.sqrt(p) * jax.random.rademacher(key, p.shape, p.dtype)
    weights = root - p * jnp.sum(root, axis=-1, keepdims=True)
    total = jnp.sum(logits * weights, axis=-1)
    return jnp.sum(jnp.where(mask, total, jnp.zeros_like(total)))


def match_fisher(fisher: Any, other: str, like: Any) -> Any:
    """fisher without the leaves that :class:`optax.MaskedNode` masks in ``like``.

    Raises:
      ValueError: fisher has another structure, or a leaf another shape.
    """
    leaves = jax.tree.leaves(like, is_leaf=_is_masked)
    treedef: Any = jax.tree.structure(like, is_leaf=_is_masked)
    try:
        parts = treedef.flatten_up_to(fisher)
    except (ValueError, TypeError):
        pass  # check_same_shapes says what is missing
    else:
        pairs = zip(leaves, parts, strict=True)
        fisher = treedef.unflatten([x if _is_masked(x) else f for x, f in pairs])
    shapes = [
        jax.ShapeDtypeStruct(_shape(leaf, name), jnp.float32)
        for leaf, name in zip(fisher_leaves(fisher), _names(fisher), strict=True)
    ]
    structure: Any = jax.tree.structure(fisher, is_leaf=_is_factored)
    check_same_shapes("fisher", structure.unflatten(shapes), other, like)
    return fisher


def fisher_leaves(fisher: Any) -> list[Any]:
    """The leaves of fisher, each an array or a :class:`FactoredFisher`."""
    return jax.tree.leaves(fisher, is_leaf=_is_factored)


def dense_fisher(leaf: Any) -> jax.Array:
    """A leaf as an array, at least float32. Jitted uses fuse it.

    It is made by products alone, which XLA computes again rather than store.
    """
    if not _is_factored(leaf):
        return at_least_float32(jnp.asarray(leaf))
    rows, columns = (at_least_float32(jnp.asarray(x)) for x in leaf)
    return _product(rows / _nonzero(jnp.mean(rows, axis=-1, keepdims=True)), columns)


def _product(rows: jax.Array, columns: jax.Array) -> jax.Array:
    return rows[..., :, None] * columns[..., None, :]


def relative_fisher(fisher: Any) -> list[jax.Array]:
    """The leaves as :func:`dense_fisher`, over the mean of all entries of all leaves.

    They are as they were where that mean is zero.
    """
    leaves = fisher_leaves(fisher)
    sizes = [_size(leaf) for leaf in leaves]
    rows = {i: jnp.asarray(x.rows) for i, x in enumerate(leaves) if _is_factored(x)}
    total, mean = sum(sizes), jnp.zeros([], jnp.float32)
    over_means = []
    for members, stack in stacks(rows):
        # Of the rows of a factored leaf the mean is that of the leaf.
        means = jnp.mean(stack, axis=range(1, stack.ndim), dtype=jnp.float32)
        if size := sizes[members[0]]:
            mean += jnp.sum(means) * (size / total)
        stack = at_least_float32(stack)
        stack = stack / _nonzero(jnp.mean(stack, axis=-1, keepdims=True))
        over_means.append((members, stack))
    for i, leaf in enumerate(leaves):
        if i not in rows and sizes[i]:
            mean += jnp.mean(jnp.asarray(leaf), dtype=jnp.float32) * (sizes[i] / total)
    factor = 1 / _nonzero(mean)
    for members, stack in over_means:
        stack = stack * factor.astype(stack.dtype)
        rows |= zip(members, jnp.unstack(stack), strict=True)

    def relative(i: int, leaf: Any) -> jax.Array:
        if i not in rows:
            dense = at_least_float32(jnp.asarray(leaf))
            return dense * factor.astype(dense.dtype)
        columns = at_least_float32(jnp.asarray(leaf.columns))
        return _product(rows[i], columns)

    return [relative(i, leaf) for i, leaf in enumerate(leaves)]


def stacks(arrays: dict[int, jax.Array]) -> list[tuple[list[int], jax.Array]]:
    """All arrays of one type as one, along a new first axis, with their keys.

    What is done to many small arrays costs a GPU a kernel each otherwise, which takes
    longer to start than to run.
    """
    kinds: dict[str, list[int]] = {}
    for i, x in arrays.items():
        kinds.setdefault(str(jax.typeof(x)), []).append(i)
    return [(keys, jnp.stack([arrays[i] for i in keys])) for keys in kinds.values()]


def abs_square(x: jax.Array) -> jax.Array:
    """|x|^2, at least float32."""
    x = at_least_float32(x)
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, jnp.ones_like(x), x)


def _is_factored(x: Any) -> bool:
    return isinstance(x, FactoredFisher)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _names(fisher: Any) -> list[str]:
    return leaf_names(jax.tree.map(lambda x: 0, fisher, is_leaf=_is_factored))


def _shape(leaf: Any, name: str) -> tuple[int, ...]:
    """The shape of the dense leaf."""
    if not _is_factored(leaf):
        return jnp.shape(leaf)
    rows, columns = map(jnp.shape, leaf)
    if not rows or not columns or rows[:-1] != columns[:-1]:
        raise ValueError(
            "fisher must have rows [..., n] and columns [..., m] of the same leading "
            f"axes, got {list(rows)} and {list(columns)} for {name}"
        )
    return (*rows, columns[-1])


def _size(leaf: Any) -> int:
    return math.prod(_shape(leaf, ""))


@jax.jit
def _squares(tree: Any) -> Any:
    return jax.tree.map(abs_square, tree)


@jax.jit
def _factored_squares(tree: Any) -> Any:
    def factor(g: jax.Array) -> Any:
        squares = abs_square(g)
        if g.ndim < 2 or not g.size:  # an empty leaf has no means
            return squares
        return FactoredFisher(jnp.mean(squares, axis=-1), jnp.mean(squares, axis=-2))

    return jax.tree.map(factor, tree)


@jax.jit
def _add(total: Any, squares: Any) -> Any:
    return jax.tree.map(jnp.add, total, squares)
