"""What benchmarks/facts.py compares: variants of the optimizer, and of the task."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

from benchmarks.facts_optimizers import (
    Context,
    adamw,
    damped,
    falling,
    filtered,
    half,
    in_metric,
    keeping,
    penalized,
    persistent,
    projections_only,
    rising,
    rows,
    scored,
    spared,
    sticky,
)


class Variant(NamedTuple):
    """A curve of the study."""

    title: str
    optimizer: Callable[[Context], optax.GradientTransformation]
    rates: tuple[float, ...]
    group: str = ""  # the task, whose AdamW the variant is held against
    steps: int = 300
    batch_size: int | None = None  # new facts a step, or all
    new_names: int = 100  # each is given a new fact
    hidden_size: int = 64
    self_replay: float = 0.0  # weight of the KL on as many of the old prompts
    importance: Literal["dense", "factored"] | None = None  # the Fisher information
    interpolate: float | None = None


USUAL = (1e-5, 2.5e-5, 6e-5, 1.5e-4, 4e-4)
LARGER = (3e-5, 7e-5, 1.8e-4, 4.5e-4, 1.1e-3)
L2, EWC = (1e-2, 1e-1, 0.3, 1.0, 3.0), (1.0, 10.0, 100.0, 1e3, 1e4)  # strengths
IN_METRIC, KEEP = (2e-5, 5e-5, 1e-4, 2e-4, 4e-4), (4e-5, 1e-4, 2e-4, 5e-4, 1.2e-3)
LARGEST = (1e-4, 2.5e-4, 6e-4, 1.5e-3, 4e-3)


def _task(group: str, faster: float = 1.0, **task: Any) -> dict[str, Variant]:
    """AdamW, MoFO and the gradient filter on one task."""
    name = group or "usual"
    usual, larger = (tuple(faster * r for r in rates) for rates in (USUAL, LARGER))
    return {
        f"adamw, {name}": Variant("AdamW", adamw, usual, group, **task),
        f"mofo, {name}": Variant("MoFO 10%", filtered(), larger, group, **task),
        f"gradient, {name}": Variant(
            "gradient filter 10%", scored("gradient"), larger, group, **task
        ),
    }


def _scored(title: str, score: Any, rates: Any = LARGER, **task: Any) -> Variant:
    return Variant(title, scored(score), rates, **task)


VARIANTS: dict[str, Variant] = {
    **_task(""),
    "mofo 3%": Variant("MoFO 3%", filtered(0.03), LARGEST),
    "mofo 30%": Variant("MoFO 30%", filtered(0.3), USUAL),
    "all leaves": Variant("MoFO, norms filtered too", filtered(mask=None), LARGER),
    "projections": Variant(
        "MoFO, embedding and head not filtered", filtered(mask=projections_only), USUAL
    ),
    "rows": Variant(
        "MoFO, every row a block",
        filtered(block_axes=lambda p: jax.tree.map(rows, p)),
        LARGER,
    ),
    "gradient 3%": Variant("gradient filter 3%", scored("gradient", 0.03), LARGEST),
    "gain": _scored("gain filter 10%", "gain"),
    "gain 3%": Variant("gain filter 3%", scored("gain", 0.03), LARGEST),
    "metric": Variant(
        "AdamW in the metric", in_metric, IN_METRIC, importance="factored"
    ),
    "keep": Variant(
        "keep: gain 10% in the metric", keeping, KEEP, importance="factored"
    ),
    "mv": _scored("MV filter 10%", "update"),
    "random": _scored("random filter 10%", "random", LARGEST),
    "hft": Variant("HFT", half, LARGER),
    "falling": Variant(
        "MoFO, alpha from 20% to 2%", scored("momentum", falling), LARGER
    ),
    "rising": Variant("MoFO, alpha from 2% to 20%", scored("momentum", rising), LARGER),
    "gradient rising": Variant(
        "gradient filter, from 2% to 20%", scored("gradient", rising), LARGER
    ),
    "fixed": Variant(
        "MoFO, mask of the first step for good", persistent(10**9), LARGEST
    ),
    "slow": Variant("MoFO, mask renewed every 30 steps", persistent(30), LARGER),
    "sticky": _scored("MoFO, entries moved before x 4", sticky(4.0)),
    "spared": _scored(
        "by momentum over sqrt of Fisher", spared, LARGEST, importance="dense"
    ),
    "damped": Variant("AdamW damped by Fisher", damped, LARGER, importance="dense"),
    "l2": Variant("AdamW, L2", penalized(adamw, 4e-4), L2),
    "l2 mofo": Variant("MoFO 10%, L2", penalized(filtered(), 1.1e-3), L2),
    "ewc": Variant("AdamW, EWC", penalized(adamw, 4e-4), EWC, importance="dense"),
    "ewc mofo": Variant(
        "MoFO 10%, EWC", penalized(filtered(), 1.1e-3), EWC, importance="dense"
    ),
    "ewc gradient": Variant(
        "gradient filter 10%, EWC",
        penalized(scored("gradient"), 1.1e-3),
        EWC,
        importance="dense",
    ),
    "keep ewc": Variant(
        "keep, EWC", penalized(keeping, 1.1e-3), EWC, importance="dense"
    ),
    "wise-ft": Variant("AdamW, Wise-FT 0.7", adamw, LARGER, interpolate=0.7),
    "wise-ft mofo": Variant("MoFO, Wise-FT 0.7", filtered(), LARGEST, interpolate=0.7),
    "self": Variant("AdamW, self-replay", adamw, USUAL, self_replay=1.0),
    "self mofo": Variant("MoFO, self-replay", filtered(), LARGER, self_replay=1.0),
    "keep self": Variant(
        "keep, self-replay", keeping, KEEP, self_replay=1.0, importance="factored"
    ),
    **_task("batches of 10", batch_size=10),
    **_task("100 steps", 2.0, steps=100),
    **_task("1000 steps", 0.5, steps=1000),
    **_task("20 new facts", new_names=20),
    **_task("400 new facts", new_names=400),
    **_task("hidden size 128", 0.7, hidden_size=128),
}
