"""What a run has learned and forgotten, as one HTML file that loads nothing else."""

import datetime
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from examples.files import write_bytes
from examples.llama.reporting import plots
from examples.llama.reporting.measured import MEASURES, Measure
from examples.llama.reporting.plots import SHARES, Metrics, significant, to_float

Tensors = Mapping[str, Mapping[str, float]]  # measures by name, by tensor
Numbers = Mapping[str, float | None]
CURVES = {
    "loss": Measure("Loss", "nats per answer token", "Falling is learning."),
    **MEASURES,
    "learning_rate": Measure("Learning rate", "", "Of each training step."),
}
MAPS = {
    "relative": Measure(
        "Relative distance per layer",
        "",
        "From the pretrained tensor, as a percentage of that tensor's norm.",
    ),
    "distance": Measure(
        "Distance per layer", "", "From the pretrained tensor, Euclidean."
    ),
    "touched": Measure(
        "Entries ever touched per layer",
        "",
        "Percentage of a tensor's entries that training has changed.",
    ),
}
STEPS = {
    "step": Measure(
        "Typical step per layer",
        "",
        "Relative to the mean over all entries. The metric makes it small where the "
        "Fisher information is large.",
    )
}
COLUMNS = ("q", "k", "v", "o", "gate", "up", "down", "norms")
BELOW = {
    "embed_tokens.embedding": "embedding",
    "lm_head.kernel": "head",
    "norm.scale": "final norm",
}
IN_LAYER = re.compile(
    r"layers\.(\d{1,4})\.(?:self_attn\.([qkvo])_proj\.kernel"
    r"|mlp\.(gate|up|down)_proj\.kernel|(?:input|post_attention)_layernorm\.scale)"
)


@matplotlib.rc_context(plots.STYLE)
def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    config: Mapping[str, Any],
    metrics: Metrics,
    before: Numbers,
    after: Numbers,
    per_tensor: Tensors,
    samples: Sequence[Mapping[str, str]],
    importance: Mapping[str, Any] | None = None,
    steps: Tensors | None = None,
) -> None:
    """Writes a report as one HTML file with its images inside.

    Whatever is missing is left out; what is None, NaN or infinite is said to be.

    Args:
      path: The file, which is replaced once the new one is complete.
      title: Of the page.
      config: Settings by name; those of a nested dictionary are named "outer.inner".
      metrics: Lines of metrics.jsonl, each with "step" and any of "loss",
        "learning_rate", the measures, and "stuck_entries", how many entries cannot
        move any more. Of two lines of one step, as a restart leaves them, the later
        one counts.
      before: Measures before training, any of "eval_loss" (nats per answer token),
        "retain_loss" and "kl" (nats per token), "distance", and "knowledge",
        "instructions" and "touched" (each 0 to 1).
      after: The same after it; and, where known, the "seconds" of training,
        "milliseconds_per_step", "tokens_per_second" and "mfu" (0 to 1).
      per_tensor: By parameter name ("layers.0.self_attn.q_proj.kernel"), any of
        "distance" (Euclidean), "norm" (of the pretrained tensor, from which distances
        are then shown relative), "touched" (0 to 1), and "size" (its entries, by
        which the shares of a layer's two norms are weighted).
      samples: Each with "prompt", "before", "after", and "expected" if that is known.
      importance: How the texts were drawn whose Fisher information divides steps:
        "source" ("self" or a file), "model", "texts", "max_length", "temperature" and
        "seed".
      steps: By parameter name, "step", the mean factor by which the metric scales the
        tensor's entries, relative to that of all entries, and "size".

    Raises:
      OSError: The file cannot be written. What was at `path` is still there.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        notes=[*_not_finite(metrics), *_stuck(metrics)],
        summary=list(_summary(before, after)),
        speed=list(_speed(after)),
        curves=list(_curves(metrics)),
        heat_maps=list(_heat_maps(per_tensor, MAPS)),
        importance="" if importance is None else _drawn(importance),
        step_maps=list(_heat_maps(steps or {}, STEPS)),
        tensors=_tensor_table(per_tensor),
        samples=samples,
        config=list(_flat(config)),
    )
    # A model may write half of a surrogate pair, which UTF-8 cannot hold.
    write_bytes(path, page.encode("utf-8", errors="replace"))


@matplotlib.rc_context(plots.STYLE)
def plot_losses(metrics: Metrics, path: str | os.PathLike[str]) -> None:
    """Draws the losses over the steps as a PNG: training and held out, retained text.

    Args:
      metrics: As `write_report` takes them.
      path: The file, which is replaced once the new one is complete.

    Raises:
      OSError: The file cannot be written. What was at `path` is still there.
    """
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.draw_training(left, metrics)
    left.set(title="Fine-tuning", ylabel="loss (nats per answer token)")
    plots.draw_measure(right, metrics, "retain_loss")
    right.set(
        title="Retained text: rising is forgetting", ylabel="loss (nats per token)"
    )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes(path, image.getvalue())


# Texts and tables


def _text(x: Any, name: str) -> str:
    """A value of the measure of that name, for a reader."""
    if math.isnan(x := to_float(x)):
        return "not finite"
    if name in (*SHARES, "relative", "mfu"):
        return f"{significant(100 * x)}%"
    if name == "size":
        return f"{x:,.0f}"
    return f"{x:.4f}" if name.endswith(("loss", "kl")) else significant(x)


def _not_finite(metrics: Metrics) -> Iterator[str]:
    for name in ("loss", *MEASURES):
        odd = [x for x in metrics if name in x and math.isnan(to_float(x[name]))]
        if odd:
            often = f", the first of {len(odd)} times" if len(odd) > 1 else ""
            yield f"{name} is not finite at step {odd[0]['step']}{often}."


def _stuck(metrics: Metrics) -> Iterator[str]:
    found = [x for x in metrics if x.get("stuck_entries")]
    if found:
        first, last = found[0], found[-1]
        yield (
            "Entries that cannot move any more, as their second moment is infinite: "
            f"{last['stuck_entries']:,}. First seen at step {first['step']}."
        )


def _summary(before: Numbers, after: Numbers) -> Iterator[dict[str, Any]]:
    for name, measure in MEASURES.items():
        texts = [_text(x[name], name) if name in x else "–" for x in (before, after)]
        if texts == ["–", "–"]:
            continue
        change = to_float(after.get(name)) - to_float(before.get(name))
        sign = "−" if change < 0 else "+"
        text = "–" if math.isnan(change) else sign + _text(abs(change), name)
        text = text.replace("%", " points")  # of percentages
        yield {"measure": measure, "values": [*texts, text]}


def _speed(after: Numbers) -> Iterator[tuple[str, str]]:
    titles = {
        "tokens_per_second": "Tokens per second",
        "mfu": "MFU, of the device's peak FLOP/s",
        "milliseconds_per_step": "Milliseconds per step",
    }
    for name, title in titles.items():
        if after.get(name) is not None:
            yield title, _text(after[name], name)
    if not math.isnan(seconds := to_float(after.get("seconds"))):
        clock = f"{datetime.timedelta(seconds=round(seconds))} (h:min:s)"
        yield "Training time", f"{seconds:.1f} s" if seconds < 120 else clock


def _drawn(importance: Mapping[str, Any]) -> str:
    """How the texts of a Fisher information were drawn, in sentences."""
    model, source = importance["model"], importance["source"]
    own = source == "self"
    writer = "the pretrained model itself" if own else f"the model {model}"
    where = "" if own else f" It was read from {source}."
    return (
        "Each step is divided by the Fisher information of texts that "
        f"{writer} wrote: {importance['texts']} texts of up to "
        f"{importance['max_length']} tokens, drawn at temperature "
        f"{importance['temperature']:g} with seed {importance['seed']}.{where}"
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", json.dumps(value, default=str, ensure_ascii=False)
        else:
            yield f"{prefix}{name}", str(value)


def _tensor_table(per_tensor: Tensors) -> list[list[str]]:
    """The header and a line for each tensor, or nothing."""
    titles = {
        "size": "Entries",
        "distance": "Distance",
        "norm": "Pretrained norm",
        "relative": "Distance / norm",
        "touched": "Ever touched",
    }
    rows = {
        name: {**values, "relative": _measure([values], "relative")}
        for name, values in per_tensor.items()
    }
    shown = [k for k in titles if any(x.get(k) is not None for x in rows.values())]
    lines = [
        [name, *(_text(x[k], k) if x.get(k) is not None else "–" for k in shown)]
        for name, x in rows.items()
    ]
    return [["Tensor", *(titles[k] for k in shown)], *lines] if shown else []


# Figures


def _curves(metrics: Metrics) -> Iterator[dict[str, Any]]:
    all_series = {name: plots.series(metrics, name) for name in CURVES}
    found = {name: x for name, x in all_series.items() if x[0].size}
    if "loss" in found:
        found.pop("eval_loss", None)  # is in the same plot
    for name, (steps, values) in found.items():
        measure = CURVES[name]
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        if name == "loss":
            plots.draw_training(axes, metrics)
        else:
            plots.draw_measure(axes, metrics, name)
        axes.set_ylabel(measure.unit)
        texts = (
            f"{_text(values[i], name)} at step {steps[i]:.0f}"
            for i in sorted({0, steps.size - 1})
        )
        alt = f"{measure.title}: {' to '.join(texts)}"
        yield {"measure": measure, "image": plots.svg(figure), "alt": alt}


def _measure(tensors: Sequence[Mapping[str, float]], name: str) -> float | None:
    """A measure of some tensors together, None where one of them does not tell it."""
    needed = ("distance", "norm") if name == "relative" else (name,)
    if any(key not in tensor for key in needed for tensor in tensors):
        return None
    values = {key: [to_float(tensor[key]) for tensor in tensors] for key in needed}
    if name in ("touched", "step"):
        return float(
            np.average(values[name], weights=[x.get("size", 1) for x in tensors])
        )
    distance = math.hypot(*values["distance"])
    if name == "distance":
        return distance
    norm = math.hypot(*values["norm"])
    return distance / norm if norm else math.nan


def _heat_maps(
    per_tensor: Tensors, maps: Mapping[str, Measure]
) -> Iterator[dict[str, Any]]:
    cells: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for name, values in per_tensor.items():
        if match := IN_LAYER.fullmatch(name):
            cell = match[1], match[2] or match[3] or "norms"
            cells.setdefault(cell, []).append(values)
        elif name in BELOW:
            cells["", BELOW[name]] = [values]
    others = len(per_tensor) - sum(map(len, cells.values()))
    more = f" {others} tensors of other names are in the table only." if others else ""
    drawn = []
    for name, measure in maps.items():
        found = {k: x for k, t in cells.items() if (x := _measure(t, name)) is not None}
        if not found or (name == "distance" and "relative" in drawn):
            continue
        drawn.append(name)
        layers: dict[int, dict[str, float]] = {}
        for (layer, column), value in found.items():
            if layer:
                layers.setdefault(int(layer), {})[column] = value
        below = {x: found["", x] for x in BELOW.values() if ("", x) in found}
        colours = "cividis" if name == "touched" else "viridis"
        figure = plots.heat_map(
            layers,
            below,
            COLUMNS,
            percent=name in ("relative", "touched"),
            colours=colours,
        )
        # The metric is looked at for what it holds still, all else for what moved.
        pick, extreme = (min, "smallest") if name == "step" else (max, "largest")
        (layer, column), value = pick(found.items(), key=lambda x: np.nan_to_num(x[1]))
        where = f"{column} of layer {layer}" if layer else column
        yield {
            "measure": measure._replace(caption=measure.caption + more),
            "image": plots.svg(figure),
            "alt": f"{measure.title}, {extreme} in {where}: {_text(value, name)}",
        }
