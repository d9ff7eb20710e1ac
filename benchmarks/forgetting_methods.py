"""The methods that the frontier compares, each with the settings along its curve."""

from typing import Any, NamedTuple

# Settings of examples.llama.config.Config.
Settings = dict[str, Any]


class Method(NamedTuple):
    """A curve: what its points have in common, and what each changes."""

    title: str
    common: Settings
    points: tuple[Settings, ...]


def rates(*values: float) -> tuple[Settings, ...]:
    return tuple({"learning_rate": value} for value in values)


ADAMW = {"method": "adamw"}
MOFO = {"method": "mofo", "alpha": 0.1}
# Where AdamW's and MoFO's losses overlap on the 260K model.
USUAL, LARGER = rates(3e-4, 6e-4, 1.2e-3, 2.4e-3), rates(6e-4, 1.2e-3, 2.4e-3, 4.8e-3)
SELF = {"replay": ("self:0.25",)}

METHODS = {
    "adamw": Method("AdamW", ADAMW, USUAL),
    "mofo": Method("MoFO 10%", MOFO, LARGER),
    "gradient": Method("gradient filter 10%", MOFO | {"method": "gradient"}, LARGER),
    "mv": Method("MV filter 10%", MOFO | {"method": "mv"}, LARGER),
    "random": Method("random filter 10%", MOFO | {"method": "random"}, LARGER),
    "hft": Method("HFT", {"method": "hft"}, USUAL),
    "lion": Method("Lion", {"method": "lion"}, rates(3e-5, 6e-5, 1.2e-4, 2.4e-4)),
    "mofo-lion": Method(
        "MoFO 10% over Lion",
        MOFO | {"method": "mofo-lion"},
        rates(1.2e-4, 2.4e-4, 4.8e-4, 9.6e-4),
    ),
    "l1": Method("AdamW, L1", ADAMW | {"regularize": ("l1:1e-5",)}, USUAL),
    "l2": Method("AdamW, L2", ADAMW | {"regularize": ("l2:1e-3",)}, USUAL),
    "ewc": Method(
        "AdamW, EWC",
        ADAMW | {"regularize": ("ewc:100",), "fisher_data": "self"},
        USUAL,
    ),
    "gem": Method("AdamW, GEM", ADAMW | {"gem": ("self",), "gem_margin": 0.0}, USUAL),
    "kl": Method("AdamW, KL", ADAMW | {"regularize": ("kl:0.1",)}, USUAL),
    "wise-ft": Method(
        "AdamW, Wise-FT",
        ADAMW | {"learning_rate": 2.4e-3},
        tuple({"interpolate": w} for w in ("0.4", "0.6", "0.8", "0.9")),
    ),
    "lora": Method(
        "LoRA 16",
        ADAMW | {"lora_rank": 16},
        rates(1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3),
    ),
    "lora-mofo": Method(
        "LoRA 16 + MoFO 10%",
        MOFO | {"lora_rank": 16},
        rates(2.4e-3, 4.8e-3, 9.6e-3, 1.92e-2),
    ),
    "self": Method("AdamW, self-replay", ADAMW | SELF, USUAL),
    "self-mofo": Method("MoFO 10%, self-replay", MOFO | SELF, LARGER),
}
