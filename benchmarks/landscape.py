"""The losses around the pretrained, the AdamW and the MoFO weights.

python -m benchmarks.landscape --suite stories260k --data-dir DIR --output FILE.json

Fine-tunes a model with AdamW and with MoFO, and measures the held-out and the
retained-text loss on the lines from the pretrained weights through each of theirs, and
on the plane through all three: the paper's figure. Writes the numbers as JSON, and
beside it the plot.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from tqdm import tqdm

from benchmarks.landscape_report import METHODS, SHOWN, plot
from benchmarks.outputs import make_room
from benchmarks.suites import Inputs
from examples import terminal
from examples.checks import check_least
from examples.environment import environment
from examples.files import write_json
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.sharding import parameter_sharding
from examples.llama.text.records import read_text
from examples.llama.training.loop import train
from examples.llama.training.setup import set_up
from mofo_jax.continual import interpolate

BEYOND = 0.5  # how far lines and plane go on, of the distances


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Inputs):
    """What to draw."""

    output: Path
    """The JSON file to write; the plot goes beside it, ending in .png."""
    adamw_rate: float = 1.2e-3
    """Learning rate of AdamW, before --rate-scale."""
    mofo_rate: float = 2.4e-3
    """Learning rate of MoFO. By default both reach about the same loss."""
    points: int = 17
    """On each line."""
    grid: int = 13
    """Points along each side of the plane."""
    eval_records: int = 100
    """Held-out records, the first ones of --eval-data."""
    retained_characters: int = 40_000
    """Of --retain-data, the first ones; each point of the plane evaluates all."""


def measure(args: Args) -> dict[str, Any]:
    """Trains, then measures.

    Returns:
      "settings"; "ends", by method the place of its weights on the plane, in units of
      Euclidean distance, from the pretrained ones at (0, 0); "lines", by method
      the "places" (0 pretrained, 1 fine-tuned) and both losses there; and
      "plane", "x", "y" and both losses, [y, x]; with the device and versions.

    Raises:
      ValueError, OSError, FloatingPointError: See `train`.
    """
    check_least("points", args.points, 2)
    check_least("grid", args.grid, 2)
    rates = {"adamw": args.adamw_rate, "mofo": args.mofo_rate}
    total = len(METHODS) * args.points + args.grid**2
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        args = args.with_made_data(scratch)
        settings = args.settings() | {"rates": rates}
        held_out = args.held_out(scratch)
        configs = {
            method: args.configuration(
                method, {"learning_rate": rate}, 0, held_out, scratch / method
            )
            for method, rate in rates.items()
        }
        ends = {}
        for method, config in configs.items():
            train(config)
            ends[method] = config.output / "model"
        retained = scratch / "retained.txt"
        text = read_text(args.paths()["retain_data"])
        retained.write_text(text[: args.retained_characters])
        config = dataclasses.replace(
            configs["adamw"], retain_data=retained, output=scratch / "unused"
        )
        run = set_up(config, say=lambda _: None)
        start = run.state.params
        tuned = {
            method: nnx.state(
                load_model(path, sharding=parameter_sharding(run.mesh)), nnx.Param
            )
            for method, path in ends.items()
        }
        with tqdm(total=total, desc="measuring", **terminal.bar_style()) as bar:

            def at(params: Any) -> dict[str, float]:
                found = run.measures(params)
                bar.set_postfix_str(f"loss {found['eval_loss']:.3f}", refresh=False)
                bar.update()
                return {name: found[name] for name in SHOWN}

            lines = {
                method: _line(at, start, end, args.points)
                for method, end in tuned.items()
            }
            places, plane = _plane(at, start, tuned, args.grid)
    settings["retained_characters"] = args.retained_characters
    return {
        "settings": settings,
        "ends": places,
        "lines": lines,
        "plane": plane,
    } | environment()


def _line(at: Callable, start: Any, end: Any, points: int) -> dict[str, list[float]]:
    places = np.linspace(-BEYOND, 1 + BEYOND, points).tolist()
    found = [at(_between(start, end, place)) for place in places]
    return {"places": places} | _columns(found)


def _plane(
    at: Callable, start: Any, tuned: dict[str, Any], grid: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Gram and Schmidt's axes: x towards AdamW's weights, y the rest of the way."""
    minus = functools.partial(jax.tree.map, jnp.subtract)
    first, second = (minus(tuned[method], start) for method in METHODS)
    length = float(optax.tree.norm(first))
    along = float(optax.tree.vdot(first, second)) / length
    rest = jax.tree.map(lambda b, a: b - along / length * a, second, first)
    height = float(optax.tree.norm(rest))
    ends = {"adamw": [length, 0.0], "mofo": [along, height]}
    widest, highest = max(length, along), height
    x = np.linspace(-BEYOND * widest, (1 + BEYOND) * widest, grid).tolist()
    y = np.linspace(-BEYOND * highest, (1 + BEYOND) * highest, grid).tolist()

    @jax.jit
    def place(x: jax.Array, y: jax.Array) -> Any:
        return jax.tree.map(
            lambda p, a, b: p + (x / length) * a + (y / height) * b, start, first, rest
        )

    rows = [_columns([at(place(jnp.float32(i), jnp.float32(j))) for i in x]) for j in y]
    return ends, {"x": x, "y": y} | _columns(rows)


def _columns(found: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [values[name] for values in found] for name in SHOWN}


@jax.jit
def _between(start: Any, end: Any, place: float) -> Any:
    return interpolate(start, end, place)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it as they end examples.llama.train."""
    program = "python -m benchmarks.landscape"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("landscape"):
        make_room(args.output)
        results = measure(args)
        write_json(args.output, results)
        plot(results, args.output.with_suffix(".png"))
    print(f"plot: {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
