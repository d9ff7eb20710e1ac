"""Drawings of a run: its curves over the steps, and heat maps over its layers.

Drawn with matplotlib under `STYLE`, in colours that the colour-blind tell apart.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

BLUE, SKY_BLUE, ORANGE = "#0072b2", "#56b4e9", "#d55e00"  # Okabe and Ito's palette
INK = "#1b2026"  # in an SVG, what follows the light or dark scheme of its page
STYLE: dict[Any, Any] = {  # matplotlib has a type of its own for the keys
    **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor"], INK),
    **dict.fromkeys(["xtick.color", "ytick.color", "grid.color"], INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "font.size": 9,
    "svg.hashsalt": "report",  # the same run, the same file
}
SCHEMES = (
    f"<style>svg {{ color: {INK} }} "
    "@media (prefers-color-scheme: dark) { svg { color: #e4e7eb } }</style>"
)
# Measures to show in per cent.
SHARES = ("knowledge", "answers", "instructions", "touched")
MANY_STEPS = 50  # from here on, the loss of each batch is also shown smoothed
MANY_LAYERS = 40  # above, a heat map has low rows without numbers

Metrics = Sequence[Mapping[str, Any]]


def to_float(x: Any) -> float:
    """A number, or NaN for infinities and for None, which JSON lines have for them."""
    return math.nan if x is None or not math.isfinite(x) else float(x)


def significant(x: float, digits: int = 4) -> str:
    """A number in so many digits, "12,345" for 12345.4 and four of them."""
    if x == 0 or not 1e-4 <= abs(x) < 1e7:
        return f"{x:.{digits}g}"
    decimals = digits - 1 - math.floor(math.log10(abs(x)))
    return f"{x:,.{max(0, decimals)}f}"


def series(metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps, ascending, and the finite values of one measure, each float64 [n].

    Of two lines of one step, as a restart leaves them, the later one counts.
    """
    points = {line["step"]: to_float(line[name]) for line in metrics if name in line}
    steps, values = np.array(sorted(points.items()), np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def svg(figure: Figure) -> str:
    """A figure as base64 of an SVG that is readable in a light and a dark scheme."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().replace(INK, "currentColor")
    text = text.replace("<defs>", SCHEMES + "<defs>", 1)
    return base64.b64encode(text.encode()).decode()


def draw_training(axes: Axes, metrics: Metrics) -> None:
    """The loss of each training batch, smoothed where there are many, and held out."""
    steps, losses = series(metrics, "loss")
    many = steps.size >= MANY_STEPS
    if steps.size:
        axes.plot(
            steps,
            losses,
            "o-" if steps.size == 1 else "-",
            color=SKY_BLUE if many else BLUE,
            linewidth=0.6 if many else 1.2,
            label="training, each batch",
        )
    if many:
        window = np.ones(steps.size // 40 | 1)  # odd, so that it has a middle
        sums, counts = (np.convolve(x, window, "same") for x in (losses, losses**0))
        label = f"training, mean of {window.size} batches"
        axes.plot(steps, sums / counts, color=BLUE, linewidth=1.8, label=label)
    steps, losses = series(metrics, "eval_loss")
    if steps.size:
        axes.plot(
            steps,
            losses,
            "o-",
            color=ORANGE,
            markersize=5,
            linewidth=0.8,
            label="held-out records",
        )
    if axes.lines:
        axes.legend()
    _finish(axes)


def draw_measure(axes: Axes, metrics: Metrics, name: str) -> None:
    """One measure over the steps, with a marker at each unless it is a long line."""
    steps, values = series(metrics, name)
    style = "s-" if steps.size < MANY_STEPS else "-"
    axes.plot(steps, values, style, color=ORANGE, markersize=4)
    if name in SHARES:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.grid(True)


def heat_map(
    layers: Mapping[int, Mapping[str, float]],
    below: Mapping[str, float],
    columns: Sequence[str],
    *,
    percent: bool,
    colours: str,
) -> Figure:
    """Layers as rows, and under them what is in no layer, on one scale from 0.

    Args:
      layers: Values by layer and column; grey where one is NaN or missing.
      below: Values by name.
      columns: Names of the columns, in their order.
      percent: Whether the values are shares, to be written as percentages.
      colours: A colour map of matplotlib's.
    """
    row = 0.25 if len(layers) <= MANY_LAYERS else 0.12  # inches
    names = sorted(layers)
    cells = [[layers[i].get(column, math.nan) for column in columns] for i in names]
    parts = [(cells, columns, row * len(names))] if names else []
    parts += [([list(below.values())], list(below), 0.25)] if below else []
    every = [x for values, _, _ in parts for x in np.ravel(values) if x > 0]
    scale = Normalize(0, max(every, default=1))
    colour_map = matplotlib.colormaps[colours].with_extremes(bad="#9e9e9e")

    heights = [height for _, _, height in parts]
    figure = Figure(
        figsize=(5.6, sum(heights) + 0.45 * len(parts)), layout="constrained"
    )
    subplots = figure.subplots(len(parts), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (values, labels, _) in zip(subplots, parts, strict=True):
        mesh = axes.pcolormesh(np.array(values), cmap=colour_map, norm=scale)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(np.arange(len(labels)) + 0.5, labels)
        axes.set_yticks([])
        if len(values) > MANY_LAYERS:
            continue
        for (i, j), x in np.ndenumerate(np.array(values)):
            if math.isfinite(x):
                text = f"{significant(100 * x, 2)}%" if percent else significant(x, 2)
                ink = _readable_on(colour_map(scale(x)))
                centre = {"ha": "center", "va": "center_baseline", "fontsize": 7}
                axes.text(j + 0.5, i + 0.5, text, color=ink, **centre)
    if names:
        step = 1 if len(names) <= MANY_LAYERS else 5
        ticks = range(0, len(names), step)
        subplots[0].set_yticks([i + 0.5 for i in ticks], [names[i] for i in ticks])
        subplots[0].set_ylabel("layer")
    bar = figure.colorbar(
        mesh,
        ax=list(subplots),
        aspect=30,
        pad=0.02,
        format=PercentFormatter(1) if percent else None,
    )
    bar.outline.set_visible(False)
    return figure


def _readable_on(rgba: tuple[float, float, float, float]) -> str:
    """Black or white, by WCAG's contrast with a colour of sRGB."""
    luminance = np.dot(np.power(rgba[:3], 2.2), (0.2126, 0.7152, 0.0722))
    return "black" if luminance > 0.18 else "white"
