"""The plot of benchmarks.landscape."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from examples.llama.reporting.measured import MEASURES
from examples.llama.reporting.plots import BLUE, ORANGE, STYLE

SHOWN = ("eval_loss", "retain_loss")
METHODS = {"adamw": "AdamW", "mofo": "MoFO 10%"}
LEVELS = 14  # of the contours


def plot(results: dict[str, Any], image: Path) -> None:
    """Lines above, the plane below; fine-tuning on the left, the pretrained right."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 7.5), layout="constrained")
        axes = figure.subplots(2, 2)
        for column, measure in enumerate(SHOWN):
            title = MEASURES[measure].name
            upper, lower = axes[:, column]
            for method, name in METHODS.items():
                line = results["lines"][method]
                style = {"adamw": (BLUE, "o"), "mofo": (ORANGE, "s")}[method]
                upper.plot(
                    line["places"],
                    line[measure],
                    color=style[0],
                    marker=style[1],
                    markersize=3,
                    label=name,
                )
            upper.set_title(f"{title}, on the lines")
            upper.set_xlabel("pretrained 0, fine-tuned 1")
            upper.set_ylabel(MEASURES[measure].unit)
            for place in (0, 1):
                upper.axvline(place, color="black", linewidth=0.6, linestyle=":")
            upper.grid()
            plane = results["plane"]
            heights = np.array(plane[measure])
            # Even steps of the logarithm: losses grow fast to the outside.
            levels = np.geomspace(heights.min(), heights.max(), LEVELS)
            drawn = lower.contourf(
                plane["x"], plane["y"], heights, levels=levels, cmap="cividis_r"
            )
            lower.contour(
                plane["x"],
                plane["y"],
                heights,
                levels=levels,
                colors="black",
                linewidths=0.4,
            )
            figure.colorbar(
                drawn, ax=lower, format="%.2f", label=MEASURES[measure].unit
            )
            marks = {"pretrained": [0.0, 0.0]} | {
                METHODS[name]: place for name, place in results["ends"].items()
            }
            for (name, (x, y)), marker in zip(marks.items(), "*os", strict=True):
                lower.plot(
                    x,
                    y,
                    marker=marker,
                    markersize=9,
                    color="white",
                    markeredgecolor="black",
                    linestyle="none",
                )
                lower.annotate(
                    name,
                    (x, y),
                    xytext=(7, 7),
                    textcoords="offset points",
                    bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1},
                )
            lower.set_title(f"{title}, on the plane through all three")
            lower.set_xlabel("distance from the pretrained weights, towards AdamW's")
            lower.set_ylabel("distance, across")
        axes[0, 0].legend()
        figure.savefig(image, dpi=150)
