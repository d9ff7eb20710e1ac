"""The table and the plot of benchmarks.accelerators."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from examples.llama.reporting.plots import STYLE

UNITS = {"tpu": "cycles", "gpu": "kernels"}
# What each method's search ranks by, for the number of its passes; AdamW has none.
SCORES = {"mofo": "momentum", "gain": "gain", "keep": "gain", "keep, F whole": "gain"}
LEAF = "one 4096x4096 leaf"


def passes_of(results: dict[str, Any], run: dict[str, Any]) -> float:
    """Passes a step, as counted in the real run."""
    if (score := SCORES.get(run["method"])) is None:
        return 0.0
    what = "one matrix" if run["case"][-1] == LEAF else "layers"
    return results["passes"][score][what]


def cost(results: dict[str, Any], run: dict[str, Any], unit: str) -> float:
    """What a step takes in all: cycles, kernels or bytes."""
    return run["step"][unit] + passes_of(results, run) * (run["pass"][unit] or 0)


def ratios(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], float, float]]:
    """Each program that fits, its cost over AdamW's, and so its bytes."""
    unit = UNITS[results["settings"]["platform"]]
    fit = [run for run in results["programs"] if "does_not_fit" not in run]
    adamw = {tuple(run["case"]): run for run in fit if run["method"] == "adamw"}
    for run in fit:
        if (base := adamw.get(tuple(run["case"]))) is None:
            continue
        yield (
            run,
            cost(results, run, unit) / cost(results, base, unit),
            cost(results, run, "bytes") / cost(results, base, "bytes"),
        )


def table(results: dict[str, Any]) -> str:
    """Every program as a row of Markdown."""
    unit = UNITS[results["settings"]["platform"]]
    counted = "; ".join(
        f"by {score} {values['one matrix']:.1f} of one matrix and "
        f"{values['layers']:.1f} of four layers together"
        for score, values in results["passes"].items()
    )
    scale, shown = (1e6, "million cycles") if unit == "cycles" else (1, "kernels")
    lines = [
        "# What a step costs on accelerators, as their compilers estimate",
        "",
        f"Nothing ran on a chip: these are the numbers of the compiled programs "
        f"({_versions(results)}). Passes a step were counted in a real run of "
        f"SmolLM2-135M on two simulated devices: {counted}.",
        "",
        f"| chips | parameters | method | step ({shown}) | each pass | over AdamW "
        "| bytes over AdamW | temporaries (MB) | collectives | their MB "
        "| compiling (s) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    digits = 2 if unit == "cycles" else 0
    for run, ratio, of_bytes in ratios(results):
        chip, _, _, chips, tree = run["case"]
        once, again = run["step"][unit] / scale, (run["pass"][unit] or 0) / scale
        lines.append(
            f"| {chips} x {chip} | {tree} | {run['method']} | {once:,.{digits}f} "
            f"| {again:,.{digits}f} | {ratio:.2f} | {of_bytes:.2f} "
            f"| {run['temporary_bytes'] / 1e6:,.1f} | {run['collectives']} "
            f"| {run['collective_bytes'] / 1e6:,.3f} | {run['seconds']:.0f} |"
        )
    for run in results["programs"]:
        if "does_not_fit" in run:
            chip, _, _, chips, tree = run["case"]
            what = f"| {chips} x {chip} | {tree} | {run['method']} | does not fit "
            lines.append(what + "| " * 7 + "|")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """The costs over AdamW's, as bars."""
    platform = results["settings"]["platform"]
    found: dict[str, dict[str, float]] = {}
    for run, ratio, _ in ratios(results):
        chip, _, _, chips, tree = run["case"]
        # Of a single leaf AdamW has three kernels; their number says nothing there.
        if run["method"] in SCORES and (platform == "tpu" or tree != LEAF):
            label = f"{chips} x {chip}\n{tree}"
            found.setdefault(label, {})[run["method"]] = ratio
    methods = [m for m in SCORES if any(m in values for values in found.values())]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / max(1, len(methods))
        for i, method in enumerate(methods):
            places = np.arange(len(found)) + (i - (len(methods) - 1) / 2) * width
            values = [x.get(method, np.nan) for x in found.values()]
            bars = axes.bar(places, values, width, label=method)
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(np.arange(len(found)), found, fontsize=7)
        unit = {"tpu": "estimated cycles", "gpu": "kernels"}[platform]
        axes.set_ylabel(f"{unit} of a step, over AdamW's")
        worst = max((x["mofo"] for x in found.values() if "mofo" in x), default=np.nan)
        axes.set_title(
            f"A step of MoFO takes up to {worst:.1f} times the {unit} of AdamW's "
            f"({'TPU' if platform == 'tpu' else 'GPU'}, by the compiler)"
        )
        figure.legend(loc="outside lower center", ncols=len(methods))
        figure.savefig(path, dpi=150)


def _versions(results: dict[str, Any]) -> str:
    return ", ".join(f"{name} {x}" for name, x in results["versions"].items())
