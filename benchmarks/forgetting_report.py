"""The frontier as tables and as a plot: what is forgotten over what is learned."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.forgetting_methods import METHODS, describe
from benchmarks.matched import Curve, at, interval, span
from examples.llama.report_plots import STYLE

MEASURES = {"retain_loss": "retained-text loss", "kl": "KL"}

Results = dict[str, Any]


def curves(results: Results, measure: str) -> dict[str, Curve]:
    """Each method's points of all seeds that are complete, by their held-out loss."""
    found = {}
    for name, method in METHODS.items():
        runs = [run for run in results["runs"] if run["method"] == name]
        seeds = []
        for seed in sorted({run["seed"] for run in runs}):
            points = [run["after"] for run in runs if run["seed"] == seed]
            if len(points) == len(method.points):
                pairs = sorted((p["eval_loss"], p[measure]) for p in points)
                seeds.append(pairs)
        if seeds:
            found[name] = np.array(seeds)
    return found


def targets(found: dict[str, Curve], count: int = 3) -> list[float]:
    """Held-out losses that AdamW and MoFO both reach with every seed, evenly spaced."""
    both = [found[name][..., 0] for name in ("adamw", "mofo") if name in found]
    low = max(float(x.min(axis=1).max()) for x in both)
    high = min(float(x.max(axis=1).min()) for x in both)
    return np.linspace(low, high, count + 2)[1:-1].tolist()


def matched(results: Results, measure: str) -> list[dict[str, Any]]:
    """A row for each loss and method that reaches it: mean, interval, gap to AdamW.

    The gap is taken seed by seed, of those that both have, before its mean and
    interval. Without a complete curve of AdamW there are no rows.
    """
    found, rows = curves(results, measure), []
    if "adamw" not in found:
        return []
    rng = np.random.default_rng(0)
    for loss in targets(found):
        base = at(found["adamw"], loss)
        for name, curve in found.items():
            values = at(curve, loss)
            if np.isnan(values).any():
                continue
            seeds = min(len(values), len(base))
            gaps = values[:seeds] - base[:seeds]
            rows.append(
                {
                    "loss": loss,
                    "method": name,
                    "seeds": len(values),
                    "mean": float(values.mean()),
                    "interval": interval(values, rng),
                    "gap": float(gaps.mean()),
                    "gap_interval": interval(gaps, rng),
                }
            )
    return rows


def report(results: Results) -> str:
    """Markdown: at matched losses, and at each method's points."""
    settings, runs = results["settings"], results["runs"]
    seeds = len({run["seed"] for run in runs})
    devices = ", ".join(sorted({run["device"] for run in runs}))
    versions = sorted(
        {", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in runs}
    )
    before = results["pretrained"]
    lines = [
        f"# What is forgotten, at matched losses: {settings['model']}",
        "",
        f"{len(runs)} runs, up to {seeds} seeds, {settings['steps']} steps of "
        f"{settings['batch_size']} records of {settings['data']}, up to "
        f"{settings['max_length']} tokens each, cosine decay; {'; '.join(versions)}, "
        f"on {devices}. Written by `python -m benchmarks.forgetting`. Held-out loss: "
        f"nats per answer token of {settings['eval_records']} records of "
        f"{settings['eval_data']}, {before['eval_loss']:.3f} before. Retained-text "
        f"loss: nats per token of {settings['retain_data']}, "
        f"{before['retain_loss']:.3f} "
        "before. KL: from the pretrained model on that text.",
        "",
    ]
    for measure, title in MEASURES.items():
        lines += [
            f"## {title[0].upper()}{title[1:]} at a matched held-out loss",
            "",
            "Interpolated along each method's curve, seed by seed; 95% bootstrap "
            "intervals over seeds. The gap is to AdamW of the same seeds, below zero "
            "where less is forgotten.",
            "",
            f"| held-out loss | method | seeds | {title} | interval | gap | interval |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in matched(results, measure):
            lines.append(
                f"| {row['loss']:.3f} | {METHODS[row['method']].title} "
                f"| {row['seeds']} | {row['mean']:.3f} | {span(row['interval'])} "
                f"| {row['gap']:+.3f} | {span(row['gap_interval'], '+.3f')} |"
            )
        lines.append("")
    lines += [
        "## Every setting",
        "",
        "Means over seeds. Touched: share of entries that differ from the pretrained "
        "ones. Time: of training, over that of AdamW.",
        "",
        "| method | setting | seeds | held-out loss | retained-text loss | KL "
        "| distance | touched | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    adamw = [run["seconds"] for run in runs if run["method"] == "adamw"]
    for name, method in METHODS.items():
        for point in method.points:
            these = [r for r in runs if (r["method"], r["point"]) == (name, point)]
            if not these:
                continue
            after = {
                key: float(np.mean([run["after"][key] for run in these]))
                for key in these[0]["after"]
            }
            seconds = np.median([run["seconds"] for run in these])
            time = f"{seconds / np.median(adamw):.2f}" if adamw else ""
            lines.append(
                f"| {method.title} | {describe(point)} | {len(these)} "
                f"| {after['eval_loss']:.3f} | {after['retain_loss']:.3f} "
                f"| {after['kl']:.3f} | {after['distance']:.2f} "
                f"| {after['touched']:.0%} | {time} |"
            )
    return "\n".join([*lines, ""])


def plot(results: Results, image: Path) -> None:
    """Curves of all methods: means over seeds, and the seeds farthest from them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5), layout="constrained")
        axes = figure.subplots(1, 2)
        colours = matplotlib.colormaps["cividis"]
        for ax, (measure, title) in zip(axes, MEASURES.items(), strict=True):
            found = curves(results, measure)
            for i, (name, curve) in enumerate(found.items()):
                x, y = curve.mean(axis=0).T
                errors = np.abs(curve - curve.mean(axis=0)).max(axis=0).T
                first = name in ("adamw", "mofo")
                ax.errorbar(
                    x,
                    y,
                    xerr=errors[0],
                    yerr=errors[1],
                    label=METHODS[name].title,
                    color={"adamw": "#0072b2", "mofo": "#d55e00"}.get(
                        name, colours(0.85 * i / max(1, len(found) - 1))
                    ),
                    marker="osD^vP*X"[i % 8],
                    markersize=5,
                    linewidth=2 if first else 1,
                    zorder=3 if first else 2,
                    capsize=2,
                )
            ax.set_xlabel("held-out loss (nats per answer token)")
            ax.set_ylabel(f"{title} (nats per token)")
            ax.grid()
        axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.suptitle(
            "Lower and further left is better: more learned, less forgotten"
        )
        figure.savefig(image, dpi=150)
