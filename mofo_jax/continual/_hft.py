"""Half fine-tuning (HFT): in every round, half of the parameters stand still."""

import numbers
import re
from typing import Any

import jax
import numpy as np

from mofo_jax._leaves import leaf_names

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def half_fine_tuning_mask(params: Any, seed: int) -> Any:
    """The parameters that one round of half fine-tuning trains.

    In each layer two of the four attention projections are trained; of the three
    feed-forward matrices two in half of the layers and one in the others (an odd layer
    has one); half of the norms, all layers' taken together; and embeddings and output
    head always. All choices are random. A bias goes with its matrix, and LoRA's factors
    with theirs.

    Use it as ``optax.selective_transform(optimizer, freeze_mask=...)`` with the mask
    negated, which saves the frozen parameters' moments too, and draw it anew with
    another seed for each round (a task, as in the paper).

    Args:
      params: Pytree with the names of Hugging Face's Llama in its paths, nested as in
        ``layers/0/self_attn/q_proj/kernel`` or flat as in
        ``model.layers.0.self_attn.q_proj.weight``.
      seed: What the choice is drawn from, 0 or above.

    Returns:
      Pytree of bools of the same structure, True where a parameter is trained. It
      depends on the seed and the names, not on the order of the leaves.

    Raises:
      ValueError: A parameter has none of the names, or the seed is not an integer of
        0 or above.

    >>> from mofo_jax.continual import half_fine_tuning_mask
    >>> names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    >>> params = {f"model.layers.0.self_attn.{name}.weight": 0.0 for name in names}
    >>> sum(half_fine_tuning_mask(params, seed=0).values())
    2

    References:
      Hui et al., `HFT: Half Fine-Tuning for Large Language Models
      <https://arxiv.org/abs/2404.18466>`_, 2024, section 2.2 (its category level).
    """
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"seed must be an integer of 0 or above, got {seed!r}")
    modules = [_module(name) for name in leaf_names(params)]
    trained = _draw(set(modules), np.random.default_rng(seed))
    leaves = [module in trained for module in modules]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _module(name: str) -> tuple[int, str]:
    """The layer (-1 outside of them) and the module that a parameter belongs to."""
    parts = re.split(r"[./]", name)
    layer = -1
    if "layers" in parts[:-1]:
        number = parts[parts.index("layers") + 1]
        layer = int(number) if number.isdigit() else -1
    for part in parts:
        known = (*_ATTENTION, *_FEED_FORWARD, "embed_tokens", "lm_head")
        if part in known or part.endswith("norm"):
            return layer, part
    raise ValueError(
        f"parameter {name} has none of the names that half fine-tuning divides: "
        f"{', '.join((*_ATTENTION, *_FEED_FORWARD))}, embed_tokens, lm_head or *norm"
    )


def _draw(
    modules: set[tuple[int, str]], rng: np.random.Generator
) -> set[tuple[int, str]]:
    """The modules that are trained."""
    ordered = sorted(modules)
    layers = sorted({layer for layer, _ in ordered if layer >= 0})
    generous = set(_some(layers, len(layers) // 2, rng))  # two feed-forward matrices
    norms = [module for module in ordered if module[1].endswith("norm")]
    trained = set(_some(norms, len(norms) // 2, rng))
    trained |= {m for m in ordered if m[1] in ("embed_tokens", "lm_head")}
    for layer in layers:
        for names, count in (
            (_ATTENTION, 2),
            (_FEED_FORWARD, 2 if layer in generous else 1),
        ):
            present = [(layer, name) for name in names if (layer, name) in modules]
            trained |= set(_some(present, min(count, len(present)), rng))
    return trained


def _some(values: list[Any], count: int, rng: np.random.Generator) -> list[Any]:
    return [values[i] for i in rng.permutation(len(values))[:count]]
