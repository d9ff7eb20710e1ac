"""What the frontier compares: methods along their curves, and the suites of them."""

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
# Where the losses of most overlap on the 260K model.
USUAL, LARGER = rates(3e-4, 6e-4, 1.2e-3, 2.4e-3), rates(6e-4, 1.2e-3, 2.4e-3, 4.8e-3)
# The two that all else is compared with have points between these as well.
USUAL_FINE = rates(3e-4, 4.2e-4, 6e-4, 8.5e-4, 1.2e-3, 1.7e-3, 2.4e-3)
LARGER_FINE = rates(6e-4, 8.5e-4, 1.2e-3, 1.7e-3, 2.4e-3, 3.4e-3, 4.8e-3)
SHARES = tuple({"interpolate": share} for share in ("0.4", "0.6", "0.8", "0.9"))
SELF = {"replay": ("self:0.25",)}

METHODS = {
    "adamw": Method("AdamW", ADAMW, USUAL_FINE),
    "mofo": Method("MoFO 10%", MOFO, LARGER_FINE),
    "gradient": Method(
        "gradient filter 10%",
        MOFO | {"method": "gradient"},
        rates(1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3),
    ),
    "mv": Method("MV filter 10%", MOFO | {"method": "mv"}, LARGER),
    "random": Method(
        "random filter 10%",
        MOFO | {"method": "random"},
        rates(2.4e-3, 4.8e-3, 9.6e-3, 1.92e-2),
    ),
    "hft": Method("HFT", {"method": "hft"}, LARGER),
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
    "wise-ft": Method("AdamW, Wise-FT", ADAMW | {"learning_rate": 2.4e-3}, SHARES),
    "wise-ft-mofo": Method(
        "MoFO 10%, Wise-FT", MOFO | {"learning_rate": 4.8e-3}, SHARES
    ),
    "lora": Method(
        "LoRA 16",
        ADAMW | {"lora_rank": 16},
        rates(4.8e-3, 9.6e-3, 1.92e-2, 3.84e-2),
    ),
    "lora-mofo": Method(
        "LoRA 16 + MoFO 10%",
        MOFO | {"lora_rank": 16},
        rates(9.6e-3, 1.92e-2, 3.84e-2, 7.68e-2),
    ),
    "self": Method("AdamW, self-replay", ADAMW | SELF, USUAL),
    "self-mofo": Method("MoFO 10%, self-replay", MOFO | SELF, LARGER),
}


class Suite(NamedTuple):
    """A model, data, and what to run on them."""

    files: Settings  # by the names of the trainer's settings, in --data-dir
    methods: tuple[str, ...]
    rate_scale: float  # times the learning rates of METHODS
    settings: Settings  # of all runs


GSM8K = {"data": "gsm8k_train.jsonl", "eval_data": "gsm8k_test.jsonl"}

SUITES = {
    "stories260k": Suite(
        {
            "model": "stories260K.bin",
            "tokenizer": "tok512.bin",
            "retain_data": "tinystories_excerpt.txt",
        }
        | GSM8K,
        tuple(METHODS),
        rate_scale=1.0,
        settings={},
    ),
    # Of the model that benchmarks.pretrain makes; as many runs as fit 20 minutes of a
    # large GPU.
    "gpu": Suite(
        {"model": "run/model", "retain_data": "held_out.txt"} | GSM8K,
        ("adamw", "mofo", "hft", "wise-ft", "self", "self-mofo"),
        rate_scale=0.1,
        settings={"dtype": "bfloat16"},
    ),
}
