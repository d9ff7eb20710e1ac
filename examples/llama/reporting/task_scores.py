"""The scores of a sequence of tasks, as text and as a heat map."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from examples.llama.reporting.plots import STYLE


def table(results: dict[str, Any]) -> str:
    """The matrix as text, a row for each task learned."""
    names = results["tasks"]
    width = max(map(len, ("pretrained", *names)))
    lines = [" ".join([" " * width, *(f"{name[:9]:>9}" for name in names)])]
    rows = zip(
        ("pretrained", *names), (results["before"], *results["scores"]), strict=False
    )
    for name, scores in rows:
        lines.append(" ".join([f"{name:{width}}", *(f"{x:9.1f}" for x in scores)]))
    for key in ("op", "bwt", "fwt"):
        if key in results:
            lines.append(f"{key.upper():{width}} {results[key]:9.2f}")
    return "\n".join(lines)


def draw(results: dict[str, Any], image: Path) -> None:
    """The matrix as a heat map."""
    names = results["tasks"]
    values = np.array([results["before"], *results["scores"]])
    with matplotlib.rc_context(STYLE):
        size = 2.5 + 0.8 * len(names)
        figure = Figure(figsize=(size, 0.7 * size), layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        rows = ["pretrained", *(f"after {name}" for name in names)]
        axes.set_yticks(range(len(values)), rows[: len(values)])
        for (t, i), value in np.ndenumerate(values):
            ink = "black" if value > 55 else "white"
            axes.text(i, t, f"{value:.1f}", ha="center", va="center", color=ink)
        axes.spines[:].set_visible(False)
        axes.set_title("Score on each task's test")
        figure.colorbar(shown, label="score")
        figure.savefig(image, dpi=150)
