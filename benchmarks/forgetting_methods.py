"""The methods that the frontier compares, each with the settings along its curve."""

from typing import Any, NamedTuple

# Settings of examples.llama.training.config.Config.
Settings = dict[str, Any]


class Method(NamedTuple):
    """A curve: what its points have in common, and what each changes."""

    title: str
    common: Settings
    points: tuple[Settings, ...]
    group: str  # of GROUPS


GROUPS = ("what moves", "how it moves, or ends", "held to the pretrained model")
MOVES, WAYS, HELD = GROUPS


def rates(*values: float) -> tuple[Settings, ...]:
    return tuple({"learning_rate": value} for value in values)


ADAMW = {"method": "adamw"}
MOFO = {"method": "mofo", "alpha": 0.1}
# Around the losses that AdamW and MoFO both reach on the 260K model. These two, which
# all else is held against, have a point more.
USUAL, LARGER = rates(3e-4, 6e-4, 1.2e-3), rates(6e-4, 1.2e-3, 2.4e-3)
LARGEST = rates(1.2e-3, 2.4e-3, 4.8e-3)
# Penalties go along their strength, as at a weak one they are AdamW.
FAST, FAST_MOFO = ADAMW | {"learning_rate": 2.4e-3}, MOFO | {"learning_rate": 3.4e-3}
SELF = {"replay": ("self:0.25",)}


def strengths(kind: str, *values: float) -> tuple[Settings, ...]:
    # Lists, as JSON has them.
    return tuple({"regularize": [f"{kind}:{value:g}"]} for value in values)


METHODS = {
    "adamw": Method("AdamW", ADAMW, (*USUAL, *rates(2.4e-3)), MOVES),
    "mofo": Method("MoFO 10%", MOFO, (*LARGER, *rates(4.8e-3)), MOVES),
    "gradient": Method(
        "gradient filter 10%",
        MOFO | {"method": "gradient"},
        LARGEST,
        MOVES,
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
    "l1": Method("AdamW, L1", FAST, strengths("l1", 3e-4, 1e-3, 3e-3), HELD),
    "l2": Method("AdamW, L2", FAST, strengths("l2", 3e-2, 1e-1, 3e-1), HELD),
    "l2-mofo": Method(
        "MoFO 10%, L2", FAST_MOFO, strengths("l2", 3e-2, 1e-1, 3e-1), HELD
    ),
    "ewc": Method(
        "AdamW, EWC",
        FAST | {"fisher_data": "self"},
        strengths("ewc", 0.03, 0.1, 0.3, 1),
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
    "self": Method("AdamW, self-replay", ADAMW | SELF, USUAL, HELD),
    "self-mofo": Method("MoFO 10%, self-replay", MOFO | SELF, LARGER, HELD),
    "self-gradient": Method(
        "gradient filter 10%, self-replay",
        MOFO | {"method": "gradient"} | SELF,
        LARGEST,
        HELD,
    ),
}


def describe(point: Settings) -> str:
    """What a point of a curve changes, for people."""
    found = []
    for name, value in point.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        found.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(found)
