"""What ranks the entries of each leaf: the scores of :func:`filter_by_momentum`."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mofo_jax._checks import at_least_float32, is_rankable
from mofo_jax._leaves import check_same_shapes, first_moments, leaf_names

Score = str | Callable[[Any, Any, Any, Any], Any]

SCORES = ("momentum", "gradient", "update", "gain", "random")


def check_score(score: Any, seed: Any) -> None:
    """Checks the score and the seed of :func:`filter_by_momentum`."""
    if not callable(score) and score not in SCORES:
        allowed = ", ".join(f'"{s}"' for s in SCORES)
        raise ValueError(f"score must be one of {allowed} or a function, got {score!r}")
    if not hasattr(seed, "dtype") and not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an integer, got {seed!r}")


def scores_of(
    score: Score,
    filtered: list[bool],
    gradients: Any,
    updates: Any,
    inner_state: Any,
    params: Any,
    *,
    seed: jax.typing.ArrayLike,
    step: jax.Array,
    subtracted: bool,
) -> list[Any]:
    """A score for each leaf; one that is not filtered may lack it.

    ``subtracted`` says that updates will be subtracted from the parameters.

    Raises:
      ValueError: The inner state has no first moment, or a function returned something
        else than an array for each update.
    """
    if score == "momentum":
        return first_moments(inner_state, updates, filtered)
    if score == "gradient":
        return jax.tree.leaves(gradients)
    if score == "update":
        return jax.tree.leaves(updates)
    if score == "gain":
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(updates), strict=True)
        return [_gain(g, u, subtracted=subtracted) for g, u in pairs]
    if score == "random":
        return _random_scores(jax.tree.leaves(updates), filtered, seed, step)
    assert callable(score)
    scores = score(gradients, updates, inner_state, params)
    _check_scores(scores, updates)
    return jax.tree.leaves(scores)


def _gain(gradient: jax.Array, step: jax.Array, *, subtracted: bool) -> jax.Array:
    """max(0, gradient * step), at least float32; of complex numbers the real part.

    Products below the smallest normal number count as 0, so that the gain is the same
    whether a device flushes them or not. NaN stays NaN.
    """
    gradient, step = at_least_float32(gradient), at_least_float32(step)
    kind = jnp.promote_types(gradient.dtype, step.dtype)
    gradient, step = gradient.astype(kind), step.astype(kind)
    product = jnp.real(jnp.conj(gradient) * step)
    if not subtracted:
        product = -product
    tiny = jnp.finfo(product.dtype).tiny.astype(product.dtype)
    return jnp.where(product < tiny, jnp.zeros_like(product), product)


def _random_scores(
    leaves: list[jax.Array],
    filtered: list[bool],
    seed: jax.typing.ArrayLike,
    step: jax.Array,
) -> list[jax.Array | None]:
    """Random 31-bit integers: float draws would tie often and favour low indices."""
    key = jax.random.fold_in(jax.random.key(seed), step)

    def draw(i: int, leaf: jax.Array) -> jax.Array:
        # On a mesh of Explicit axes an array's type carries its sharding.
        sharding: Any = jax.typeof(leaf).sharding
        bits = jax.random.bits(
            jax.random.fold_in(key, i),
            leaf.shape,
            jnp.uint32,
            out_sharding=None if sharding.mesh.are_all_axes_auto else sharding,
        )
        return (bits >> 1).astype(jnp.int32)

    return [
        draw(i, leaf) if is_filtered else None
        for i, (leaf, is_filtered) in enumerate(zip(leaves, filtered, strict=True))
    ]


def _check_scores(scores: Any, updates: Any) -> None:
    check_same_shapes("what score returns", scores, "the updates", updates)
    for name, x in zip(leaf_names(scores), jax.tree.leaves(scores), strict=True):
        if not is_rankable(dtype := jnp.result_type(x)):
            raise ValueError(
                "score must return floating (of 16 bits or more) or complex arrays, "
                f"got {dtype.name} for {name}"
            )
