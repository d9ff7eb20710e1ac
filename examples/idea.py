"""Draw what moves in a step of MoFO, and what in one of Adam.

python -m examples.idea --output docs/results/idea.png

Of one weight matrix of the quickstart's model, a few steps into fine-tuning.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from examples import quickstart, terminal
from examples.llama.reporting.plots import BLUE, ORANGE, STYLE
from mofo_jax import mofo

MATRIX = ("layers", 0, "mlp", "up_proj", "kernel")
STEPS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """What to draw."""

    output: Path
    """The picture to write."""
    alpha: float = 0.1
    """The fraction that moves."""
    seed: int = 0
    """Seed for the facts and the model."""


def momentum_and_updates(args: Args) -> dict[str, np.ndarray]:
    """Adam's first moment of the matrix, Adam's update and MoFO's, in one step."""
    adam, filtered = optax.adam(1e-3), mofo(1e-3, alpha=args.alpha)
    config = quickstart.Config(seed=args.seed)
    old, new = quickstart.make_world(config.seed, config.new_names)
    graphdef, params = quickstart.pretrain(config, old)
    state = adam.init(params)
    state_filtered = filtered.init(params)
    gradient_of = jax.jit(jax.grad(quickstart.loss_fn), static_argnums=1)
    for _ in range(STEPS):
        gradients = gradient_of(params, graphdef, new)
        # The moments are the same: MoFO's are dense, and both see these gradients.
        updates, state = adam.update(gradients, state)
        some, state_filtered = filtered.update(gradients, state_filtered, params)
        params = optax.apply_updates(params, some)
    trees = {"momentum": optax.tree.get(state, "mu"), "adam": updates, "mofo": some}
    return {name: _matrix(tree) for name, tree in trees.items()}


def _matrix(tree: Any) -> np.ndarray:
    for part in MATRIX:
        tree = tree[part]
    return np.asarray(jnp.abs(tree[...]))


def draw(found: dict[str, np.ndarray], alpha: float, path: Path) -> None:
    """Magnitudes: the momentum as a picture and in order, and both updates."""
    ordered = np.sort(found["momentum"].ravel())[::-1]
    k = max(1, int(alpha * ordered.size))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        momentum, ranks, adam, filtered = figure.subplots(1, 4)
        largest = found["adam"].max()
        for axes, name, title, top in (
            (momentum, "momentum", "momentum of a weight matrix", ordered[k // 4]),
            (adam, "adam", "Adam moves every entry", largest),
            (filtered, "mofo", f"MoFO moves {alpha:.0%} of them", largest),
        ):
            axes.imshow(found[name], cmap="Greys", vmin=0, vmax=top, aspect="auto")
            axes.set(title=title, xticks=[], yticks=[])
        x = np.arange(1, ordered.size + 1) / ordered.size
        ranks.fill_between(x[:k], ordered[:k], color=ORANGE)
        ranks.fill_between(x[k - 1 :], ordered[k - 1 :], color=BLUE, alpha=0.35)
        ranks.axhline(ordered[k - 1], color="black", linewidth=0.8, linestyle=":")
        ranks.annotate("threshold", (0.98, ordered[k - 1]), ha="right", va="bottom")
        ranks.annotate(f"largest {alpha:.0%}:\nthese move", (alpha, ordered[k // 3]))
        ranks.set(title="its entries in order", yticks=[], xlabel="share of entries")
        ranks.set(xlim=(0, 1), ylim=(0, ordered[0]), xticks=(0, alpha, 0.5, 1))
        figure.savefig(path, dpi=150)


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, prog="python -m examples.idea", description=__doc__)
    with terminal.errors_on_one_line("idea"):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(momentum_and_updates(args), args.alpha, args.output)
        print(args.output)


if __name__ == "__main__":
    main()
