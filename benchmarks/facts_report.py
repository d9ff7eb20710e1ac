"""The variants of benchmarks/facts.py against AdamW on the same task."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.facts_variants import VARIANTS
from benchmarks.matched_table import table
from benchmarks.outputs import made_with
from examples.llama.reporting.plots import BLUE, INK, ORANGE, STYLE
from mofo_jax.continual import Comparison, compare_at_loss, pareto_frontier

LOSSES = (0.1, 0.03, 0.01)  # of the new facts, in nats
SHOWN = (0.03, 0.01)  # in the plot
# What is measured: heading, how many times to multiply it, and the form of a number.
MEASURES = {
    "old_facts": ("old facts recalled, %", 100, ".1f"),
    "kl": ("KL from the pretrained model, nats", 1, ".3f"),
}

Results = dict[str, Any]


def curve(results: Results, name: str, measure: str) -> list[np.ndarray]:
    """The curve of each seed that has all points, over the logarithm of the loss."""
    rates = VARIANTS[name].rates
    of_seeds: dict[int, list[Any]] = {}
    for run in results["runs"]:
        if run["variant"] == name and run["rate"] in rates:
            of_seeds.setdefault(run["seed"], []).append(run)
    _, factor, _ = MEASURES[measure]
    return [
        pareto_frontier(
            [(float(np.log(run["loss"])), factor * run[measure]) for run in runs],
            larger_is_better=measure == "old_facts",
        )
        for _, runs in sorted(of_seeds.items())
        if len(runs) == len(rates)
    ]


def gaps(results: Results, measure: str, loss: float) -> dict[str, Comparison]:
    """Each variant that reaches the loss, against AdamW on the same task."""
    curves = {name: curve(results, name, measure) for name in VARIANTS}
    base = {name: f"adamw, {VARIANTS[name].group or 'usual'}" for name in VARIANTS}
    curves = {
        name: seeds for name, seeds in curves.items() if seeds and curves[base[name]]
    }
    return compare_at_loss(curves, base, float(np.log(loss)))


def report(results: Results) -> str:
    """Markdown: for each measure and loss, every variant beside AdamW."""
    seeds = len({run["seed"] for run in results["runs"]})
    # Older files have the device and versions once, for all runs.
    made = made_with(results | run for run in results["runs"])
    lines = [
        "# Variants of MoFO on the quickstart's facts, at matched losses",
        "",
        f"{len(results['runs'])} runs, up to {seeds} seeds (worlds of facts, with a "
        f"model each); {made}. Written by "
        "`python -m benchmarks.facts`. The usual task: 100 new facts, all in each "
        "batch, 300 steps. Interpolated along each variant's learning rates, seed by "
        "seed. The gap is to AdamW on the same task, with its 95% bootstrap interval "
        "over seeds; empty where a variant's learning rates do not reach the loss.",
        "",
    ]
    titles = {
        name: (variant.group or "usual", variant.title)
        for name, variant in VARIANTS.items()
    }
    for measure, (title, _, form) in MEASURES.items():
        found = {loss: gaps(results, measure, loss) for loss in LOSSES}
        lines += [
            f"## {title[0].upper()}{title[1:]}, by the loss on the new facts",
            "",
            *table(("task", "variant"), titles, found, form),
            "",
        ]
    return "\n".join(lines)


def plot(results: Results, image: Path) -> None:
    """The gaps to AdamW in the old facts recalled, a row a variant."""
    found = {loss: gaps(results, "old_facts", loss) for loss in SHOWN}
    names = [
        name
        for name, variant in VARIANTS.items()
        if variant.title != "AdamW" and any(name in rows for rows in found.values())
    ]
    names.reverse()  # the first one at the top
    with matplotlib.rc_context(STYLE):
        size = (9, 1.2 + 0.22 * max(1, len(names)))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(SHOWN), sharey=True)
        for ax, (loss, rows) in zip(axes, found.items(), strict=True):
            for y, name in enumerate(names):
                if name in rows:
                    _draw(ax, y, VARIANTS[name].title, rows[name])
            ax.axvline(0, color="black", linewidth=0.8)
            ax.set_title(f"at a loss of {loss} on the new facts")
            ax.grid(axis="x")
        titles = [
            f"{VARIANTS[name].title} ({VARIANTS[name].group})"
            if VARIANTS[name].group
            else VARIANTS[name].title
            for name in names
        ]
        axes[0].set_yticks(range(len(names)), titles, fontsize=8)
        figure.supxlabel(
            "old facts recalled more than by AdamW (percentage points)", fontsize=9
        )
        figure.savefig(image, dpi=150)


def _draw(ax: Axes, y: int, title: str, row: Comparison) -> None:
    low, high = np.nan_to_num(row.interval, nan=row.gap)
    kinds = {"MoFO": ORANGE, "gradient": INK}
    colour = kinds.get(title.split(" ")[0].rstrip(","), BLUE)
    ax.plot([low, high], [y, y], color=colour, linewidth=1.5)
    ax.plot(row.gap, y, marker="o", markersize=4, color=colour)
