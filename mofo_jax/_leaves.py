"""What the filter needs to know of each leaf: name, mask, block axes, first moment."""

import numbers
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mofo_jax._checks import is_rankable, normalize_block_axes

# A pytree of bools like the parameters, a prefix of one, or a function that makes one.
FilterMask = Any
# Axes for all leaves, a pytree of axes like the parameters, or a function of them.
BlockAxesTree = Any

# Where Optax keeps a first moment: adam, lion, adabelief, muon and others; sgd and
# rmsprop with momentum; adafactor with momentum; adan.
_MOMENT_FIELDS = ("mu", "trace", "ema", "m")


def all_but_norms_and_biases(params: Any) -> Any:
    """A ``filter_mask`` that filters all parameters but norms and biases.

    The choice of the MoFO authors' released code, by the names of the parameters. A
    parameter is left out, and so gets the whole update, if one part of its path
    contains "norm" or "bias" (in any case) or "ln" as in "ln_1", "ln_f" or
    "final_ln", or if its own name is "scale", which is what Flax calls the weight of
    every normalization. This covers the names of Flax NNX and Linen and of Hugging
    Face (also as flat dictionaries with dots); a normalization that its module names
    otherwise, or not at all (in ``equinox.nn.Sequential``), is filtered.

    Args:
      params: Pytree of parameters with named paths.

    Returns:
      Pytree of bools of the same structure.

    Raises:
      ValueError: params is a single array, which has no name.

    >>> import jax.numpy as jnp
    >>> from mofo_jax import all_but_norms_and_biases
    >>> all_but_norms_and_biases({"q_proj": {"kernel": 0.0, "bias": 0.0},
    ...                           "input_layernorm": {"scale": 0.0}})
    {'input_layernorm': {'scale': False}, 'q_proj': {'bias': False, 'kernel': True}}
    """

    def is_filtered(path: Any, _: Any) -> bool:
        if not path:
            raise ValueError(
                "all_but_norms_and_biases needs named parameters, got a single array "
                "(under optax.inject_hyperparams list filter_mask in static_args)"
            )
        parts = re.split(r"[./]", _name(path).lower())
        if parts[-1] == "value" and len(parts) > 1:  # an nnx.Variable's
            parts.pop()
        return parts[-1] != "scale" and not any(
            "norm" in part or "bias" in part or re.search(r"(^|_)ln(_|\d|$)", part)
            for part in parts
        )

    return jax.tree_util.tree_map_with_path(is_filtered, params)


def resolve_mask(params: Any, filter_mask: FilterMask) -> list[bool]:
    """Per leaf of params, whether it is filtered."""
    leaves = _broadcast("filter_mask", filter_mask, params, lambda x: False, True)
    for path, leaf in zip(leaf_names(params), leaves, strict=True):
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"filter_mask must hold bools, got {leaf!r} for parameter {path}"
            )
    return leaves


def resolve_block_axes(params: Any, block_axes: BlockAxesTree) -> list[tuple[int, ...]]:
    """Per leaf of params, its block axes as sorted non-negative integers."""
    specs = _broadcast("block_axes", block_axes, params, _is_axes, None)
    named = zip(jax.tree.leaves(params), specs, leaf_names(params), strict=True)
    return [
        normalize_block_axes(spec, jnp.shape(leaf), f"parameter {name}")
        for leaf, spec, name in named
    ]


def first_moments(state: Any, params: Any, filtered: list[bool]) -> list[Any]:
    """First moments from an Optax state, one per leaf, None where not filtered.

    A state of several parts (optax.partition, muon) has several trees with
    :class:`optax.MaskedNode` in each other's places; each leaf is taken from the one
    that has it.
    """
    treedef: Any = jax.tree.structure(params)
    trees: list[list[Any]] = []
    for field in _MOMENT_FIELDS:
        for _, tree in optax.tree.get_all_with_path(state, field):
            try:
                trees.append(treedef.flatten_up_to(tree))
            except (ValueError, TypeError):
                continue  # of another structure: not a moment of these parameters
        if trees:
            break
    else:
        raise ValueError(
            "inner must keep a first moment for score='momentum', but its state has "
            f"none of the fields {', '.join(_MOMENT_FIELDS)} in the parameters' "
            "structure: give it momentum (optax.sgd(..., momentum=0.9)), or another "
            "score"
        )
    moments = []
    named = zip(jax.tree.leaves(params), filtered, leaf_names(params), strict=True)
    for i, (leaf, is_filtered, name) in enumerate(named):
        shape = jnp.shape(leaf)
        found = [t[i] for t in trees if getattr(t[i], "shape", None) == shape]
        if is_filtered and len(found) != 1:
            raise ValueError(
                f"inner's state has {len(found)} first moments '{field}' for "
                f"parameter {name}, and exactly one is needed: leave the parameter "
                "out by filter_mask, or give a score function"
            )
        moments.append(found[0] if is_filtered else None)
    return moments


def check_dtypes(params: Any) -> None:
    """Raises unless all parameters are floating or complex."""
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        dtype = jnp.result_type(leaf)
        if not is_rankable(dtype):
            raise TypeError(
                f"parameter {name} has dtype {dtype.name}, but only floating (of 16 "
                "bits or more) and complex parameters can be filtered: leave it out by "
                "optax.masked or optax.partition"
            )


def check_same_shapes(argument: str, tree: Any, other: str, like: Any) -> None:
    """Raises unless a tree has the structure and the shapes of the other one."""
    shapes = [
        dict(zip(leaf_names(x), map(jnp.shape, jax.tree.leaves(x)), strict=True))
        for x in (tree, like)
    ]
    for name in shapes[1] | shapes[0]:
        got, expected = (x.get(name, "no leaf") for x in shapes)
        if got != expected:
            raise ValueError(
                f"{argument} must have the structure and shapes of {other}, got "
                f"{got} for {name}, which there is {expected}"
            )
    got, expected = (jax.tree.structure(x) for x in (tree, like))
    if str(got) != str(expected):
        raise ValueError(f"{argument} must have the structure {expected}, got {got}")


def cast_like(tree: Any, like: Any) -> Any:
    """Floating and complex arrays of the tree, in the dtypes of another one."""

    def cast(x: Any, y: Any) -> Any:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact):
            return x.astype(jnp.result_type(y))
        return x

    return jax.tree.map(cast, tree, like, is_leaf=lambda x: x is None)


def leaf_names(params: Any) -> list[str]:
    """Paths of the leaves, such as ``layers/0/q_proj/kernel``."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [_name(path) for path, _ in paths]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the only leaf)"


def _is_axes(x: Any) -> bool:
    if type(x) is tuple:  # a list or a named tuple is a pytree of axes
        return all(isinstance(a, numbers.Integral) for a in x)
    return bool(jax.tree_util.all_leaves([x]))


def _broadcast(
    argument: str, tree: Any, params: Any, is_leaf: Callable[[Any], bool], default: Any
) -> list[Any]:
    """Leaves of a tree that is a prefix of params, as many as params has."""
    if callable(tree) and jax.tree_util.all_leaves([tree]):  # no callable module
        tree = tree(params)
    if tree is None:
        return [default] * len(jax.tree.leaves(params))
    leaves: list[Any] = []
    try:
        jax.tree.map(
            lambda leaf, part: leaves.extend([leaf] * len(jax.tree.leaves(part))),
            tree,
            params,
            is_leaf=lambda x: x is None or is_leaf(x),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{argument} must have the structure of the parameters, or be a prefix of "
            f"it: {error}"
        ) from None
    return leaves
