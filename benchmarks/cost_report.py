"""The table and the plots of benchmarks.cost."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The targets that the project set itself: what must be, and what it aims at.
ORDINARY, ADVERSARIAL = (2.0, 1.3), (4.0, 2.0)


def table(results: dict[str, Any]) -> str:
    """Every target and its measurement, as Markdown.

    Sections that were not measured are left out.
    """
    rows = [("measure", "must", "aim", "measured", "")]
    rows += list(_rows(results))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    line = lambda row: (
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        + " |"
    )
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    lines = [line(rows[0]), rule, *map(line, rows[1:])]
    repeats = results["settings"]["repeats"]
    head = [
        "# What a step costs beside AdamW's",
        "",
        f"{results['device']}, jax {results['versions']['jax']}. Ratios of whole "
        "jitted, donated steps, mofo / optax.adamw, alpha 10%, float32: the median of "
        f"{repeats} pairs in turns.",
        "",
    ]
    lines = [*head, *lines]
    if (passes := results.get("passes")) is not None:
        lines += [
            "",
            f"The search for one 4096x4096 leaf takes {passes['mean']:.1f} passes over "
            f"the momentum on average, and {passes['most']} at most.",
        ]
    if "others" in results:
        lines += ["", *_others(results)]
    return "\n".join(lines) + "\n"


def _rows(results: dict[str, Any]) -> Any:
    for name, value in results.items():
        if name.startswith("step: "):
            _, tree, gradients = name.split(": ")
            limits = ORDINARY if gradients == "ordinary" else ADVERSARIAL
            measured = value["mofo"]["ratio"]
            yield _row(f"step, {tree}, {gradients}", limits, measured, "{:.2f}")
    if (compilation := results.get("compilation")) is not None:
        what = f"{compilation['leaves']} leaves of Llama-2-7B"
        ratio = compilation["ratio"]
        yield _row(f"trace and compile, {what}", (3.0, 1.5), ratio, "{:.2f}")
        memory = compilation["mofo"]["temporary_mib"]
        aim = compilation["adamw"]["temporary_mib"]
        yield _row(f"temporary MiB, {what}", (600, aim), memory, "{:.1f}")
        extra = compilation["extra_bytes_a_block"]
        yield _row("bytes of extra state a block", (64, 64), extra, "{:.1f}")
    for layout, value in results.get("communication", {}).items():
        yield _row(
            f"largest collective, {layout}", (4096, None), value["largest"], "{}"
        )
        yield _row(f"collectives a step, {layout}", (40, 10), value["a_step"], "{}")
    if (whole := results.get("fine-tuning")) is not None:
        more = 100 * (whole["mofo"]["ratio"] - 1)
        yield _row("% more, whole fine-tuning step", (3, 1), more, "{:.1f}")


def _row(
    name: str, limits: tuple[float, float | None], measured: float, form: str
) -> tuple[str, ...]:
    must, aim = limits
    verdict = "misses" if measured > must else "meets the must"
    if measured <= must and aim is not None and measured <= aim:
        verdict = "meets the aim"
    shown = ["" if x is None else f"{x:g}" for x in (must, aim)]
    return (name, *shown, form.format(measured), verdict)


def _others(results: dict[str, Any]) -> list[str]:
    lines = ["| one 2048x2048 leaf | ms | ratio to optax.adamw |", "|---|---|---|"]
    for name, value in results["others"].items():
        lines.append(f"| {name} | {value['ms']:.1f} | {value['ratio']:.2f} |")
    return lines


def plot(results: dict[str, Any], image: Path) -> None:
    """How the ratio grows with the size of a leaf and with the number of leaves."""
    if (growth := results.get("growth")) is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="tight")
    plots = (("sizes", "entries of one leaf"), ("leaves", "leaves of 32x32 entries"))
    for axis, (key, label) in zip(axes, plots, strict=True):
        axis.plot(*zip(*growth[key], strict=True), "o-", color="#0072B2")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.axhline(2, color="#D55E00", linestyle="--", linewidth=1)
        axis.set(xscale="log", xlabel=label)
    axes[0].set_ylabel("step time, mofo / adamw")
    axes[0].set_ylim(bottom=0)
    axes[1].text(1e3, 2.07, "the limit the project set", color="#D55E00", ha="right")
    figure.savefig(image, dpi=150)
    plt.close(figure)
