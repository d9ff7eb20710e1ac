"""The methods that the frontier compares, each with the settings along its curve."""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.forgetting_losses import eaft, flow
from benchmarks.forgetting_metrics import (
    fatigue,
    kronecker,
    refreshed,
    scored,
    second_order,
    texts_at,
)
from benchmarks.forgetting_optimizers import (
    by_leaf,
    finch,
    in_bfloat16,
    keep_partially_adaptive,
    keep_with,
    leaf_mean,
    partially_adaptive,
    root,
)
from benchmarks.forgetting_oracle import oracle
from examples.llama.training.config import Config
from examples.llama.training.optimizers import MakeOptimizer
from examples.llama.training.steps import Loss

# Settings of examples.llama.training.config.Config.
Settings = dict[str, Any]


class Method(NamedTuple):
    """A curve: what its points have in common, and what each changes."""

    title: str
    common: Settings
    points: tuple[Settings, ...]
    group: str  # of GROUPS
    # What the trainer does not have; see `train`.
    optimizer: MakeOptimizer | None = None
    loss: Callable[[Config], Loss] | None = None


GROUPS = (
    "what moves",
    "how it moves, or ends",
    "in the pretrained model's metric",
    "what counts",
    "held to the pretrained model",
    "keep, in parts",
)
MOVES, WAYS, METRIC, COUNTS, HELD, PARTS = GROUPS


def rates(*values: float) -> tuple[Settings, ...]:
    return tuple({"learning_rate": value} for value in values)


ADAMW = {"method": "adamw"}
MOFO = {"method": "mofo", "alpha": 0.1}
GAIN, KEEP = MOFO | {"method": "gain"}, {"method": "keep"}
# Around the losses that AdamW and MoFO both reach on the 260K model.
USUAL, LARGER = rates(3e-4, 6e-4, 1.2e-3), rates(6e-4, 1.2e-3, 2.4e-3)
LARGEST = rates(1.2e-3, 2.4e-3, 4.8e-3)
# What is held against them goes from where little is learned to beyond the best rate.
WIDE = rates(3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3)
# In the metric, where most entries matter little, larger ones do.
IN_METRIC = rates(1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
MIDDLE = IN_METRIC[1:4]
WIDE_LARGER = rates(6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3)
WIDE_SMALLER = rates(1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)
# Penalties go along their strength, as at a weak one they are AdamW.
FAST, FAST_MOFO = ADAMW | {"learning_rate": 2.4e-3}, MOFO | {"learning_rate": 3.4e-3}
FAST_KEEP = KEEP | {"learning_rate": 1.2e-2}
SELF = {"replay": ("self:0.25",)}
OWN_METRIC = {"importance": "self"}


def strengths(kind: str, *values: float) -> tuple[Settings, ...]:
    # Lists, as JSON has them.
    return tuple({"regularize": [f"{kind}:{value:g}"]} for value in values)


METHODS = {
    "adamw": Method("AdamW", ADAMW, WIDE, MOVES),
    "mofo": Method("MoFO 10%", MOFO, WIDE_LARGER, MOVES),
    "gradient": Method(
        "gradient filter 10%",
        MOFO | {"method": "gradient"},
        (*LARGEST, *rates(9.6e-3, 1.92e-2)),
        MOVES,
    ),
    "gain": Method("gain filter 10%", GAIN, WIDE_LARGER, MOVES),
    "signs": Method(
        "Adam, where its step descends", GAIN | {"alpha": 1.0}, WIDE, MOVES
    ),
    "mv": Method("MV filter 10%", MOFO | {"method": "mv"}, LARGER, MOVES),
    "random": Method(
        "random filter 10%",
        MOFO | {"method": "random"},
        rates(2.4e-3, 4.8e-3, 9.6e-3),
        MOVES,
    ),
    "hft": Method("HFT", {"method": "hft"}, LARGER, MOVES),
    "lion": Method("Lion", {"method": "lion"}, rates(1.2e-4, 2.4e-4, 9.6e-4), WAYS),
    "mofo-lion": Method(
        "MoFO 10% over Lion",
        MOFO | {"method": "mofo-lion"},
        rates(4.8e-4, 9.6e-4, 1.92e-3),
        WAYS,
    ),
    "sgd": Method(
        "SGD, momentum 0.9",
        {"method": "sgd"},
        rates(2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
        WAYS,
    ),
    "padam": Method(
        "Adam with v^(1/4)", ADAMW, WIDE_SMALLER, WAYS, optimizer=partially_adaptive
    ),
    "metric": Method("AdamW in the metric", ADAMW | OWN_METRIC, WIDE, METRIC),
    "metric-sgd": Method(
        "momentum in the metric", {"method": "sgd"} | OWN_METRIC, WIDE, METRIC
    ),
    "keep": Method("keep: gain 10% in the metric", KEEP, IN_METRIC, METRIC),
    "keep-ewc": Method(
        "keep, EWC",
        FAST_KEEP | {"fisher_data": "self"},
        strengths("ewc", 0.01, 0.03, 0.1, 0.3, 1),
        METRIC,
    ),
    "keep-self": Method("keep, self-replay", KEEP | SELF, IN_METRIC, METRIC),
    "finch": Method("AdamW, FINCH", ADAMW, WIDE, COUNTS, optimizer=finch),
    "flow": Method("AdamW, FLOW", ADAMW, WIDE, COUNTS, loss=flow),
    "eaft": Method("AdamW, EAFT", ADAMW, WIDE, COUNTS, loss=eaft),
    "l1": Method("AdamW, L1", FAST, strengths("l1", 3e-4, 1e-3, 3e-3), HELD),
    "l2": Method("AdamW, L2", FAST, strengths("l2", 1e-2, 3e-2, 1e-1, 3e-1, 1), HELD),
    "l2-mofo": Method(
        "MoFO 10%, L2", FAST_MOFO, strengths("l2", 3e-2, 1e-1, 3e-1), HELD
    ),
    "ewc": Method(
        "AdamW, EWC",
        FAST | {"fisher_data": "self"},
        strengths("ewc", 0.01, 0.03, 0.1, 0.3, 1),
        HELD,
    ),
    "ewc-mofo": Method(
        "MoFO 10%, EWC",
        FAST_MOFO | {"fisher_data": "self"},
        strengths("ewc", 0.03, 0.1, 0.3, 1),
        HELD,
    ),
    "gem": Method(
        "AdamW, GEM", ADAMW | {"gem": ("self",), "gem_margin": 0.0}, USUAL, HELD
    ),
    "kl": Method("AdamW, KL", ADAMW | {"regularize": ("kl:0.1",)}, USUAL, HELD),
    "wise-ft": Method(
        "AdamW, Wise-FT",
        FAST,
        tuple({"interpolate": share} for share in ("0.6", "0.8", "0.9")),
        WAYS,
    ),
    "lora": Method(
        "LoRA 16",
        ADAMW | {"lora_rank": 16},
        rates(2.4e-3, 4.8e-3, 9.6e-3),
        WAYS,
    ),
    "lora-mofo": Method(
        "LoRA 16 + MoFO 10%",
        MOFO | {"lora_rank": 16},
        rates(4.8e-3, 9.6e-3, 1.92e-2),
        WAYS,
    ),
    "self": Method("AdamW, self-replay", ADAMW | SELF, WIDE, HELD),
    "self-mofo": Method("MoFO 10%, self-replay", MOFO | SELF, LARGER, HELD),
    "self-gradient": Method(
        "gradient filter 10%, self-replay",
        MOFO | {"method": "gradient"} | SELF,
        LARGEST,
        HELD,
    ),
}


def _part(title: str, optimizer: MakeOptimizer | None = None, **common: Any) -> Method:
    """The method keep with one thing changed."""
    return Method(f"keep, {title}", KEEP | common, MIDDLE, PARTS, optimizer)


DENSE = {"regularize": ("ewc:1",), "fisher_data": "self", "fisher_records": 32}
METHODS |= {
    "damping-0.1": _part("damping 0.1", keep_with(damping=0.1)),
    "damping-0.03": _part("damping 0.03", keep_with(damping=0.03)),
    "damping-0.003": _part("damping 0.003", keep_with(damping=0.003)),
    "damping-0.001": _part("damping 0.001", keep_with(damping=0.001)),
    "root": _part("square root of F, damping 0.05", keep_with(root, damping=0.05)),
    "by-leaf": _part("F relative to each leaf's mean", keep_with(by_leaf)),
    "leaf-mean": _part("one number a leaf", keep_with(leaf_mean)),
    # The penalty is left out; it has the dense estimate made.
    "dense": _part("dense F", keep_with(fisher="fisher"), **DENSE),
    "bfloat16": _part("F in bfloat16", keep_with(in_bfloat16)),
    "last-step": _part("mean square of one step", keep_with(decay=0.0)),
    "texts-8": _part("8 texts", importance_texts=8),
    "texts-128": _part("128 texts", importance_texts=128),
    "texts-512": _part("512 texts", importance_texts=512),
    "cooler": _part("texts at temperature 0.7", texts_at(0.7)),
    "likeliest": _part("the likeliest text alone", texts_at(0.0)),
    "refreshed": _part("dense F, made anew halfway", refreshed),
    "kronecker": _part("Kronecker factors of F", kronecker),
    "alpha-1": _part("alpha 1%", alpha=0.01),
    "alpha-3": _part("alpha 3%", alpha=0.03),
    "alpha-30": _part("alpha 30%", alpha=0.3),
    "alpha-100": _part("all that descends", alpha=1.0),
    "by-momentum": _part("filter by momentum", method="mofo", importance="self"),
    "by-gradient": _part("filter by gradient", method="gradient", importance="self"),
    "second-order": _part("gain less predicted forgetting", scored(second_order)),
    "fatigue": _part("gain less where much moved", scored(fatigue)),
    "quarter": _part("v^(1/4)", keep_partially_adaptive),
    "oracle": Method(
        "oracle: momentum, the whole matrix F", ADAMW, WIDE, PARTS, oracle
    ),
}
ABLATION = (
    *("adamw", "mofo", "gain", "metric", "metric-sgd", "keep"),
    *(name for name, method in METHODS.items() if method.group == PARTS),
)

# The claim, its controls and its rivals, on any pair.
MAIN = (
    *("adamw", "padam", "signs", "sgd", "mofo", "gradient", "gain"),
    *("metric", "metric-sgd", "keep", "keep-ewc", "keep-self"),
    *("finch", "flow", "eaft", "ewc", "l2", "self"),
)


def describe(point: Settings) -> str:
    """What a point of a curve changes, for people."""
    found = []
    for name, value in point.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        found.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(found)
