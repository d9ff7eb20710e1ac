"""Quickstart: a small Llama forgets less when MoFO fine-tunes it. No files, no network.

A synthetic world holds facts (name, relation, value). A small Llama is pretrained until
it recalls all of them, then fine-tuned on a new relation of some of the names, with
AdamW and with MoFO at several learning rates. The table and the plot show, for every
run, how many of the new facts it knows and how many of the old ones it still recalls.

Run it with `python -m examples.quickstart`; it takes one to two minutes on two cores.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

from examples import terminal
from examples.checks import check_least, check_seed
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama
from examples.llama.reporting.plots import BLUE, ORANGE
from mofo_jax import all_but_norms_and_biases, distance, mofo

# A name is two tokens, so that a fact is (first, second, relation, value).
FIRSTS, SECONDS, RELATIONS, VALUES = 20, 20, 4, 50
OLD_RELATIONS = 3  # the fourth one is what fine-tuning teaches
VOCABULARY = FIRSTS + SECONDS + RELATIONS + VALUES

METHODS = {"AdamW": None, "MoFO 10%": 0.1, "MoFO 3%": 0.03}
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LOOK_EVERY = 20  # pretraining steps, to see whether all is recalled


@dataclasses.dataclass(frozen=True)
class Config:
    """What the quickstart runs."""

    output: Annotated[Path, tyro.conf.arg(help="directory for results")] = Path(
        "runs/quickstart"
    )
    steps: Annotated[int, tyro.conf.arg(help="fine-tuning steps of each run")] = 300
    new_names: Annotated[int, tyro.conf.arg(help="names given a new fact")] = 100
    pretraining_steps: Annotated[int, tyro.conf.arg(help="at most so many")] = 3000
    hidden_size: Annotated[int, tyro.conf.arg(help="of the model")] = 64
    seed: Annotated[int, tyro.conf.arg(help="of the world and of the model")] = 0


def check(config: Config) -> None:
    """Raises ValueError that names the argument."""
    check_seed(config.seed)
    check_least("steps", config.steps, 1)
    check_least("pretraining_steps", config.pretraining_steps, LOOK_EVERY)
    if not 1 <= config.new_names <= FIRSTS * SECONDS:
        raise ValueError(
            f"new_names must be 1 to {FIRSTS * SECONDS}, got {config.new_names}"
        )
    if config.hidden_size < 1 or config.hidden_size % 8:  # four heads of even size
        raise ValueError(
            f"hidden_size must be a multiple of 8, got {config.hidden_size}"
        )


def make_world(seed: int, new_names: int) -> tuple[jax.Array, jax.Array]:
    """Old and new facts as int32 tokens of shape [facts, 4]."""
    rng = np.random.default_rng(seed)
    names = np.stack(np.divmod(np.arange(FIRSTS * SECONDS), SECONDS), 1)
    names[:, 1] += FIRSTS

    def facts(names: np.ndarray, relation: int) -> np.ndarray:
        first_value = FIRSTS + SECONDS + RELATIONS
        values = rng.integers(first_value, VOCABULARY, (len(names), 1))
        relations = np.full((len(names), 1), FIRSTS + SECONDS + relation)
        return np.concatenate([names, relations, values], 1)

    old = np.concatenate([facts(names, r) for r in range(OLD_RELATIONS)])
    some = rng.permutation(names)[:new_names]
    return jnp.int32(old), jnp.int32(facts(some, OLD_RELATIONS))


def value_logits(graphdef: Any, params: Any, facts: jax.Array) -> jax.Array:
    """Logits of the value given the rest of the fact, float32 [facts, vocabulary]."""
    return nnx.merge(graphdef, params)(facts[:, :-1])[:, -1]


def loss_fn(params: Any, graphdef: Any, facts: jax.Array) -> jax.Array:
    logits = value_logits(graphdef, params, facts)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, facts[:, -1])
    return losses.mean()


@jax.jit(static_argnames="graphdef")
def recall(params: Any, graphdef: Any, facts: jax.Array) -> jax.Array:
    """Share of the facts whose value is the model's first choice."""
    logits = value_logits(graphdef, params, facts)
    return jnp.mean(logits.argmax(-1) == facts[:, -1], dtype=jnp.float32)


def make_optimizer(alpha: float | None, learning_rate: Any) -> Any:
    if alpha is None:
        return optax.adamw(learning_rate, weight_decay=0.0)
    # The one line that changes.
    return mofo(learning_rate, alpha, filter_mask=all_but_norms_and_biases)


@jax.jit(static_argnames=("graphdef", "alpha"), donate_argnames=("params", "state"))
def train_step(
    params: Any,
    state: Any,
    facts: jax.Array,
    learning_rate: jax.Array,
    *,
    graphdef: Any,
    alpha: float | None,
) -> tuple[Any, Any, jax.Array]:
    """One step; the learning rate is traced, so that all of them share a program."""
    loss, gradients = jax.value_and_grad(loss_fn)(params, graphdef, facts)
    optimizer = make_optimizer(alpha, learning_rate)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def make_model(config: Config) -> tuple[Any, Any]:
    """A small Llama that knows nothing yet."""
    model = Llama(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden_size,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8,
            tie_word_embeddings=False,
        ),
        rngs=nnx.Rngs(config.seed),
    )
    return nnx.split(model, nnx.Param)


def pretrain(config: Config, old: jax.Array) -> tuple[Any, Any]:
    """Trains a new model until it recalls every old fact."""
    graphdef, params = make_model(config)
    step = functools.partial(train_step, graphdef=graphdef, alpha=None)
    state = make_optimizer(None, 0.0).init(params)
    bar = tqdm(
        range(config.pretraining_steps), desc="pretraining", **terminal.bar_style()
    )
    for i in bar:
        params, state, loss = step(params, state, old, jnp.float32(3e-3))
        if i % LOOK_EVERY == LOOK_EVERY - 1:
            recalled = float(recall(params, graphdef, old))
            bar.set_postfix(loss=f"{loss:.4f}", recall=f"{recalled:.1%}")
            # A margin beyond the first time that all are right.
            if recalled == 1 and loss < 0.01:
                bar.close()
                return graphdef, params
    raise ValueError(
        f"after {config.pretraining_steps} steps {recalled:.1%} of the facts are "
        "recalled: allow more --pretraining-steps"
    )


def fine_tune(
    config: Config,
    graphdef: Any,
    pretrained: Any,
    old: jax.Array,
    new: jax.Array,
    alpha: float | None,
    rate: float,
    bar: tqdm,
) -> dict[str, Any]:
    """One run from the pretrained parameters; returns what the table shows of it."""
    step = functools.partial(train_step, graphdef=graphdef, alpha=alpha)
    params = jax.tree.map(jnp.copy, pretrained)  # each step donates its arguments
    state = make_optimizer(alpha, rate).init(params)
    times = []
    for i in range(config.steps):
        start = time.perf_counter()
        params, state, loss = jax.block_until_ready(
            step(params, state, new, jnp.float32(rate))
        )
        times.append(time.perf_counter() - start)
        bar.update()
        if i % 50 == 49:
            bar.set_postfix(loss=f"{float(loss):.4f}")
    return {
        "loss": float(loss),
        "new_facts": float(recall(params, graphdef, new)),
        "old_facts": float(recall(params, graphdef, old)),
        "distance": float(distance(params, pretrained)),
        "ms_per_step": 1e3 * float(np.median(times)),
    }


def print_table(runs: list[dict[str, Any]]) -> None:
    print(
        f"\n{'method':9} {'learning rate':>13} {'new facts':>10} {'loss':>8} "
        f"{'old facts':>10} {'distance':>9} {'ms/step':>8}"
    )
    for run in runs:
        print(
            f"{run['method']:9} {run['learning_rate']:13.0e} {run['new_facts']:10.1%} "
            f"{run['loss']:8.4f} {run['old_facts']:10.1%} {run['distance']:9.2f} "
            f"{run['ms_per_step']:8.1f}"
        )
    print(
        "\nCompare at the same learning rate, and also at the same loss on the new "
        "facts:\na smaller learning rate makes AdamW, too, forget less."
    )


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = zip(METHODS, (BLUE, ORANGE, "black"), "os^", strict=True)
    for method, color, marker in styles:
        mine = [run for run in runs if run["method"] == method]
        style = {"color": color, "marker": marker, "label": method}
        rates = [run["learning_rate"] for run in mine]
        kept = [100 * run["old_facts"] for run in mine]
        left.plot(rates, kept, **style)
        right.plot([run["loss"] for run in mine], kept, **style)
    left.set(xscale="log", xlabel="learning rate", ylabel="old facts recalled (%)")
    left.set_title("At the same learning rate")
    right.set(xscale="log", xlabel="loss on the new facts (nats)")
    right.set_title("At the same loss on the new facts")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    """Runs it all; ValueError and OSError name what is wrong with an argument."""
    check(config)
    config.output.mkdir(parents=True, exist_ok=True)
    old, new = make_world(config.seed, config.new_names)
    print(f"{len(old)} old facts to recall, {len(new)} new ones to learn")
    graphdef, pretrained = pretrain(config, old)
    runs = []
    total = len(METHODS) * len(LEARNING_RATES) * config.steps
    with tqdm(total=total, desc="fine-tuning", **terminal.bar_style()) as bar:
        for method, alpha in METHODS.items():
            for rate in LEARNING_RATES:
                bar.set_description(f"{method}, learning rate {rate:.0e}")
                run = fine_tune(
                    config, graphdef, pretrained, old, new, alpha, rate, bar
                )
                runs.append({"method": method, "learning_rate": rate, **run})
    print_table(runs)
    results, figure = (
        config.output / "quickstart.json",
        config.output / "quickstart.png",
    )
    settings = {**dataclasses.asdict(config), "output": str(config.output)}
    results.write_text(json.dumps({"config": settings, "runs": runs}, indent=1) + "\n")
    plot(runs, figure)
    print(f"\nnumbers: {results}\nplot:    {figure}")
    return runs


def command(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it with one line and exit code 2."""
    program = "python -m examples.quickstart"
    config = tyro.cli(Config, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("quickstart"):
        main(config)


if __name__ == "__main__":
    command()
