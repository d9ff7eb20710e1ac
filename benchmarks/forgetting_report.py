"""The frontier as tables and as a plot: what is forgotten over what is learned."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.forgetting_methods import GROUPS, METHODS, Settings, describe
from benchmarks.matched_table import table
from benchmarks.outputs import made_with
from examples.llama.reporting.measured import MEASURES
from examples.llama.reporting.plots import BLUE, ORANGE, STYLE
from mofo_jax.continual import Comparison, compare_at_loss, pareto_frontier

ONE_RATE = 2.4e-3  # before a suite's scale: one that most methods' curves have
REFERENCES = {"adamw": (BLUE, "o"), "mofo": (ORANGE, "s")}  # in every panel
# The rest of Okabe and Ito's palette but its yellow, and a grey. What differs by a
# filter alone has one colour: no filter is drawn through, a filter by its line.
COLOURS = ("#000000", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
LINES = {"mofo": "--", "gradient": ":", "gain": "-."}
MARKERS = "D^vPXdp<>*"  # each curve of a group has its own
FORGOTTEN = ("retain_loss", "kl")
KEPT = tuple(name for name, measure in MEASURES.items() if measure.kept)

Results = dict[str, Any]


def shown(results: Results) -> list[str]:
    """The measures of forgetting that the runs have."""
    return [*FORGOTTEN, *(name for name in KEPT if name in results["pretrained"])]


def measured(results: Results, measure: str) -> dict[str, np.ndarray]:
    """The curves of each method, [seeds, points, 2], for seeds that have all points.

    A point is the held-out loss and what was measured; points are in the order of the
    method's. Those that no seed has yet do not count, nor do those at which one
    diverged.
    """
    found = {}
    for name, method in METHODS.items():
        of_seeds: dict[int, list[Any]] = {}
        for run in results["runs"]:
            if run["method"] == name:
                of_seeds.setdefault(run["seed"], []).append(run)
        runs = [run for runs in of_seeds.values() for run in runs]
        there = [run["point"] for run in runs]
        diverged = [run["point"] for run in runs if "diverged" in run]
        points = [x for x in method.points if x in there and x not in diverged]
        seeds = []
        for seed in sorted(of_seeds):
            of_point = [
                [run["after"] for run in of_seeds[seed] if run["point"] == point]
                for point in points
            ]
            if points and all(of_point):
                seeds.append(
                    [(after["eval_loss"], after[measure]) for (after,) in of_point]
                )
        if seeds:
            found[name] = np.array(seeds)
    return found


def curves(results: Results, measure: str) -> dict[str, list[np.ndarray]]:
    """Each method's frontier, for all seeds that are complete."""
    kept = measure in KEPT
    return {
        name: [pareto_frontier(points, larger_is_better=kept) for points in seeds]
        for name, seeds in measured(results, measure).items()
    }


def targets(found: dict[str, list[np.ndarray]]) -> list[float]:
    """Held-out losses that AdamW and MoFO reach with every seed, evenly spaced.

    None where no loss is reached by all, as with a single point of one of them.
    """
    both = [*found["adamw"], *found.get("mofo", [])]
    low = max(float(points[0, 0]) for points in both)
    high = min(float(points[-1, 0]) for points in both)
    return np.linspace(low, high, 5)[1:-1].tolist() if low < high else []


def matched(results: Results, measure: str) -> dict[float, dict[str, Comparison]]:
    """By loss and method, the comparison with AdamW of the same seeds."""
    found = curves(results, measure)
    if "adamw" not in found:
        return {}
    return {loss: compare_at_loss(found, "adamw", loss) for loss in targets(found)}


def report(results: Results) -> str:
    """Markdown: at matched losses, and at each method's points."""
    settings, runs = results["settings"], results["runs"]
    seeds = len({run["seed"] for run in runs})
    before = results["pretrained"]
    lines = [
        f"# What is forgotten, at matched losses: {settings['model']}",
        "",
        f"{len(runs)} runs, up to {seeds} seeds, {settings['steps']} steps of "
        f"{settings['batch_size']} records of {settings['data']}, up to "
        f"{settings['max_length']} tokens each, cosine decay; {made_with(runs)}. "
        "Written by `python -m benchmarks.forgetting`. Held-out loss: "
        f"nats per answer token of {settings['eval_records']} records of "
        f"{settings['eval_data']}, {before['eval_loss']:.3f} before. Retained-text "
        f"loss: nats per token of {settings['retain_data']}, "
        f"{before['retain_loss']:.3f} "
        "before. KL: from the pretrained model on that text.",
        "",
    ]
    titles = {name: (method.title,) for name, method in METHODS.items()}
    for measure in shown(results):
        if not (compared := matched(results, measure)):
            continue
        title = MEASURES[measure].name
        less = "above" if measure in KEPT else "below"
        lines += [
            f"## {title[0].upper()}{title[1:]} at a matched held-out loss",
            "",
            "Interpolated along each method's curve, seed by seed; empty where that "
            "does not reach the loss with every seed. The gap is to AdamW of the same "
            f"seeds, {less} zero where less is forgotten, with its 95% bootstrap "
            "interval over seeds.",
            "",
            *table(("method",), titles, compared, ".3f"),
            "",
        ]
    if rows := _settings(results, lambda *point: _rate(*point) == ONE_RATE):
        lines += [
            f"## At one learning rate, {ONE_RATE * settings['rate_scale']:g}",
            "",
            "As papers compare: what is learned differs, and so does what is "
            "forgotten.",
            "",
            *rows,
            "",
        ]
    lines += [
        "## Every setting",
        "",
        *_settings(results, lambda name, point: True),
        "",
        "Means over seeds, and half of the range. Touched: share of entries that are "
        "not the pretrained ones. Time: of the method's fastest training, over that of "
        "AdamW. Preparing: writing texts and making the Fisher information, without "
        "compiling, in steps of AdamW's training. Both: their sum over the time of "
        "AdamW's training. Memory: what the compiled step needs at most, over that of "
        "AdamW's. Empty where older runs did not measure it.",
        "",
    ]
    return "\n".join(lines)


def _rate(name: str, point: Settings) -> float:
    return (METHODS[name].common | point)["learning_rate"]


def _scaled(point: Settings, scale: float) -> Settings:
    """With the learning rate that the trainer was given."""
    if "learning_rate" not in point:
        return point
    return point | {"learning_rate": float(f"{point['learning_rate'] * scale:.4g}")}


def _settings(results: Results, chosen: Callable[[str, Settings], bool]) -> list[str]:
    """A table of the methods' points, as they were measured; no line without any."""
    kept = [name for name in shown(results) if name in KEPT]
    heads = (
        *("method", "setting", "seeds", "held-out loss", "retained-text loss", "KL"),
        *(MEASURES[name].name for name in kept),
        *("distance", "touched", "time", "preparing", "both", "memory"),
    )
    runs, scale = results["runs"], results["settings"]["rate_scale"]
    lines: list[str] = []
    for name, method in METHODS.items():
        for point in method.points:
            these = [r for r in runs if (r["method"], r["point"]) == (name, point)]
            if not these or not chosen(name, point):
                continue
            cells = [method.title, describe(_scaled(point, scale)), str(len(these))]
            if lost := sum("diverged" in run for run in these):
                cells += [f"{lost} diverged", *(len(heads) - 4) * [""]]
                lines.append(f"| {' | '.join(cells)} |")
                continue
            after = {
                key: np.array([run["after"][key] for run in these])
                for key in these[0]["after"]
            }
            for key in ("eval_loss", "retain_loss", "kl"):
                spread = np.ptp(after[key]) / 2
                cells.append(f"{after[key].mean():.3f} ± {spread:.3f}")
            for key in kept:
                spread = np.ptp(after[key]) / 2
                cells.append(f"{after[key].mean():.1%} ± {spread:.1%}")
            cells.append(f"{after['distance'].mean():.2f}")
            cells.append(f"{after['touched'].mean():.0%}")
            cells += _costs(results, name)
            lines.append(f"| {' | '.join(cells)} |")
    head = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return [*head, *lines] if lines else []


def _costs(results: Results, name: str) -> list[str]:
    """What a method takes beside AdamW, for the table.

    The runs that were made to be timed are compared, where there are any; else those
    where both ran last: on one device, with one allocator and as many runs at a time.
    """
    runs = results.get("costs") or results["runs"]

    def place(run: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(run.get(key) for key in ("device", "allocator", "workers"))

    def least(name: str, what: str) -> float:
        """In the run that other work has slowed the least; NaN if nothing is known."""
        found = [
            run[what]
            for run in runs
            if run["method"] == name and place(run) == shared and what in run
        ]
        return min(found, default=np.nan)

    of_adamw = {place(run) for run in runs if run["method"] == "adamw"}
    own = [place(run) for run in runs if run["method"] == name]
    shared = next((x for x in reversed(own) if x in of_adamw), None)
    # Whatever is computed from a NaN is NaN too.
    seconds = least("adamw", "seconds")
    training = least(name, "seconds") / seconds
    preparing = least(name, "preparing") / seconds
    cells = (
        (training, ".2f"),
        (preparing * results["settings"]["steps"], ".0f"),
        (training + preparing, ".2f"),
        (least(name, "bytes") / least("adamw", "bytes"), ".3f"),
    )
    return ["" if np.isnan(x) else f"{x:{form}}" for x, form in cells]


def plot(results: Results, image: Path) -> None:
    """The curves of each group of methods, AdamW's and MoFO's in each."""
    before = results["pretrained"]
    others = {run["method"] for run in results["runs"]} - REFERENCES.keys()
    present = {METHODS[name].group for name in others}
    groups = [group for group in GROUPS if group in present] or GROUPS[:1]
    with matplotlib.rc_context(STYLE):
        measures = shown(results)
        size = 1 + 4 * len(groups), 1 + 4 * len(measures)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(
            len(measures), len(groups), sharex=True, sharey="row", squeeze=False
        )
        for row, measure in zip(axes, measures, strict=True):
            found = measured(results, measure)
            for ax, group in zip(row, groups, strict=True):
                for name, points in found.items():
                    if METHODS[name].group == group or name in REFERENCES:
                        _draw(ax, name, points)
                ax.axhline(before[measure], color="black", linewidth=0.8, linestyle=":")
                ax.grid()
                if "adamw" in found:
                    frontiers = np.concatenate(curves(results, measure)["adamw"])
                    # Every method's best loss is in view. What learns less than AdamW
                    # at its smallest rate, or forgets more, is in the table alone.
                    best = [points[..., 0].min() for points in found.values()]
                    x = np.append(frontiers[:, 0], best)
                    y = np.append(frontiers[:, 1], before[measure])
                    ax.set_xlim(*_with_margin(x))
                    ax.set_ylim(*_with_margin(y))
                    if measure in KEPT:  # upside down, so that lower is better here too
                        ax.yaxis.set_inverted(True)
            row[0].set_ylabel(MEASURES[measure].label)
        for ax, group in zip(axes[0], groups, strict=True):
            ax.set_title(group)
        for ax in axes[-1]:
            ax.set_xlabel(MEASURES["eval_loss"].label)
            bars, titles = ax.get_legend_handles_labels()
            if bars:
                ax.legend(
                    [line for line, *_ in bars],
                    titles,
                    loc="upper center",
                    bbox_to_anchor=(0.5, -0.13),  # below, where it covers no curve
                    ncols=2,
                    fontsize=8,
                    columnspacing=1,
                    handlelength=3,
                )
        title = (
            "Lower and further left is better: more learned, less forgotten "
            "(dotted: the pretrained model). What is out of view is in the table."
        )
        figure.suptitle(textwrap.fill(title, 50 * len(groups)))
        figure.savefig(image, dpi=150)


def _with_margin(values: np.ndarray) -> tuple[float, float]:
    """The range of values, and a tenth of it on each side."""
    low, high = float(values.min()), float(values.max())
    margin = 0.1 * (high - low) + 1e-6  # also where nothing differs
    return low - margin, high + margin


def _base(name: str) -> str:
    """A method's name without its filter, if anything remains."""
    return "-".join(part for part in name.split("-") if part not in LINES) or name


def _draw(ax: Axes, name: str, points: np.ndarray) -> None:
    """Means over seeds, and the seeds farthest from them."""
    first = name in REFERENCES
    line = "-"
    if first:
        colour, marker = REFERENCES[name]
    else:
        group = [k for k, v in METHODS.items() if v.group == METHODS[name].group]
        group = [other for other in group if other not in REFERENCES]
        bases = list(dict.fromkeys(_base(other) for other in group))
        colour = COLOURS[bases.index(_base(name)) % len(COLOURS)]
        marker = MARKERS[group.index(name) % len(MARKERS)]
        line = next((LINES[part] for part in name.split("-") if part in LINES), "-")
    x, y = points.mean(axis=0).T
    errors = np.abs(points - points.mean(axis=0)).max(axis=0).T
    ax.errorbar(
        x,
        y,
        xerr=errors[0],
        yerr=errors[1],
        label=METHODS[name].title,
        color=colour,
        linestyle=line,
        marker=marker,
        markersize=5,
        linewidth=2.5 if first else 1.2,
        zorder=2 if first else 3,
        elinewidth=1,
        capsize=1.5,
    )
