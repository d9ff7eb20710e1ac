"""Quickstart: a small Llama learns new facts. How many old ones does it forget?

A synthetic world holds facts (name, relation, value). A small Llama is pretrained until
it recalls all of them. Then it is fine-tuned on a new relation of some of the names, at
several learning rates each, with

- AdamW,
- MoFO: only the tenth of the entries with the largest momentum moves,
- keep: only the tenth that lowers the loss most moves, and entries on which the
  pretrained model's own answers depend move less. It sees no old answers.

The table and the plot show, for every run, how many of the new facts the model knows
and how many of the old ones it still recalls. No files, no network.

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
import matplotlib
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
from examples.llama.reporting.plots import BLUE, INK, ORANGE, STYLE
from mofo_jax import all_but_norms_and_biases, distance, mofo
from mofo_jax.continual import (
    fisher_diagonal,
    fisher_probe,
    pareto_frontier,
    scale_by_fisher,
    value_at_loss,
)

# A name is two tokens, so that a fact is (first, second, relation, value).
FIRSTS, SECONDS, RELATIONS, VALUES = 20, 20, 4, 50
OLD_RELATIONS = 3  # the fourth one is what fine-tuning teaches
VOCABULARY = FIRSTS + SECONDS + RELATIONS + VALUES

LEARNING_RATES = {
    "AdamW": (2e-5, 6e-5, 2e-4, 6e-4, 2e-3),
    "MoFO 10%": (5e-5, 1e-4, 3e-4, 1e-3, 4e-3),
    "keep 10%": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3),
}
MATCHED_LOSS = 0.01  # on the new facts, in nats; the methods are compared there
FISHER_PROMPTS = 300
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


def make_optimizer(method: str, learning_rate: Any) -> Any:
    """By the names in LEARNING_RATES. The update of "keep 10%" needs `fisher`."""
    if method == "AdamW":
        return optax.adamw(learning_rate, weight_decay=0.0)
    if method == "MoFO 10%":
        # The one line that changes.
        return mofo(learning_rate, 0.1, filter_mask=all_but_norms_and_biases)
    # keep: entries are chosen by gain, and steps divided by the Fisher information.
    return mofo(
        learning_rate,
        0.1,
        score="gain",
        precondition=scale_by_fisher(),
        filter_mask=all_but_norms_and_biases,
    )


@jax.jit(static_argnames=("graphdef", "method"), donate_argnames=("params", "state"))
def train_step(
    params: Any,
    state: Any,
    facts: jax.Array,
    learning_rate: jax.Array,
    fisher: Any = None,
    *,
    graphdef: Any,
    method: str,
) -> tuple[Any, Any, jax.Array]:
    """One step; the learning rate is traced, so that all of them share a program."""
    loss, gradients = jax.value_and_grad(loss_fn)(params, graphdef, facts)
    optimizer = optax.with_extra_args_support(make_optimizer(method, learning_rate))
    updates, state = optimizer.update(gradients, state, params, fisher=fisher)
    return optax.apply_updates(params, updates), state, loss


def own_fisher(
    key: jax.Array,
    graphdef: Any,
    pretrained: Any,
    old: jax.Array,
    *,
    factored: bool = True,
) -> Any:
    """The Fisher information of the pretrained model's own answers to old prompts.

    Only FISHER_PROMPTS prompts (name, relation) of the old facts are used, and all
    values that the model might answer, as likely as it finds them.
    """
    rows, probes = jax.random.split(key)
    chosen = jax.random.choice(rows, len(old), (FISHER_PROMPTS,), replace=False)
    examples = zip(old[chosen], jax.random.split(probes, FISHER_PROMPTS), strict=True)
    gradient = functools.partial(_gradient, graphdef=graphdef)
    return fisher_diagonal(gradient, pretrained, examples, factored=factored)


@jax.jit(static_argnames="graphdef")
def _gradient(params: Any, example: Any, graphdef: Any) -> Any:
    fact, key = example

    def probe(params: Any) -> jax.Array:
        return fisher_probe(value_logits(graphdef, params, fact[None]), key)

    return jax.grad(probe)(params)


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
    step = functools.partial(train_step, graphdef=graphdef, method="AdamW")
    state = make_optimizer("AdamW", 0.0).init(params)
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
    fisher: Any,
    method: str,
    rate: float,
    bar: tqdm,
) -> dict[str, Any]:
    """One run from the pretrained parameters; returns what the table shows of it."""
    step = functools.partial(train_step, graphdef=graphdef, method=method)
    params = jax.tree.map(jnp.copy, pretrained)  # each step donates its arguments
    state = make_optimizer(method, rate).init(params)
    times = []
    for i in range(config.steps):
        start = time.perf_counter()
        params, state, loss = jax.block_until_ready(
            step(params, state, new, jnp.float32(rate), fisher)
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


def old_facts_at_loss(
    runs: list[dict[str, Any]], loss: float = MATCHED_LOSS
) -> dict[str, float]:
    """The share of old facts that each method recalls at a loss on the new ones.

    Interpolated between learning rates. A method is left out if its runs do not span
    that loss.
    """
    shares = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        points = [
            (np.log(run["loss"]), run["old_facts"])
            for run in runs
            if run["method"] == method and 0 < run["loss"] < np.inf
        ]
        if points:
            curve = pareto_frontier(points, larger_is_better=True)
            (share,) = value_at_loss([curve], float(np.log(loss)))
            if np.isfinite(share):
                shares[method] = float(share)
    return shares


def title_at_loss(runs: list[dict[str, Any]]) -> str:
    """Which method forgets least, if one is ahead by a point or more, and numbers."""
    shares = old_facts_at_loss(runs)
    if not shares:
        return "At the same loss on the new facts"
    title = f"At a loss of {MATCHED_LOSS} on the new facts"
    if shares.keys() == {run["method"] for run in runs}:
        first, *others = sorted(shares, key=lambda method: -shares[method])
        if others and shares[first] - shares[others[0]] >= 0.01:
            best = f"{_short(first)} forgets the fewest old facts"
            title = f"At a loss of {MATCHED_LOSS}, {best}"
    numbers = [f"{_short(method)} {share:.0%}" for method, share in shares.items()]
    return f"{title}\nRecalled: {', '.join(numbers)}"


def sentence_at_loss(runs: list[dict[str, Any]]) -> str:
    """The title's numbers as a sentence, which also names methods without a number."""
    shares = old_facts_at_loss(runs)
    if not shares:
        return f"No method's runs span a loss of {MATCHED_LOSS} on the new facts."
    parts = [f"{_short(method)} {share:.0%}" for method, share in shares.items()]
    name, number = parts[0].split(" ")
    parts[0] = f"{name} recalls {number} of the old ones"
    text = f"At a loss of {MATCHED_LOSS} on the new facts, {_listed(parts)}"
    missing = dict.fromkeys(
        run["method"] for run in runs if run["method"] not in shares
    )
    if missing:
        text += f"; the runs of {_listed(list(map(_short, missing)))} do not span it"
    return text + "."


def _short(method: str) -> str:
    return method.split(" ")[0]


def _listed(parts: list[str]) -> str:
    *before, last = parts
    return f"{', '.join(before)} and {last}" if before else last


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
    print(f"\n{sentence_at_loss(runs)}")


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        right.axvline(MATCHED_LOSS, color=INK, linewidth=0.8, linestyle=":")
        styles = zip(LEARNING_RATES, (BLUE, ORANGE, INK), "os^", strict=True)
        for method, color, marker in styles:
            mine = [run for run in runs if run["method"] == method]
            style = {"color": color, "marker": marker, "label": method}
            rates = [run["learning_rate"] for run in mine]
            kept = [100 * run["old_facts"] for run in mine]
            left.plot(rates, kept, **style)
            right.plot([run["loss"] for run in mine], kept, **style)
        left.set(xscale="log", xlabel="learning rate", ylabel="old facts recalled (%)")
        left.set(title="At the same learning rate", ylim=(0, 102))
        right.set(xscale="log", xlabel="loss on the new facts (nats)")
        right.set_title(title_at_loss(runs))
        right.legend(loc="lower right")
        for axes in (left, right):
            axes.grid(True)
        figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    """Runs it all; ValueError and OSError name what is wrong with an argument."""
    check(config)
    config.output.mkdir(parents=True, exist_ok=True)
    old, new = make_world(config.seed, config.new_names)
    print(f"{len(old)} old facts to recall, {len(new)} new ones to learn")
    graphdef, pretrained = pretrain(config, old)
    fisher = own_fisher(jax.random.key(config.seed), graphdef, pretrained, old)
    runs = []
    total = sum(map(len, LEARNING_RATES.values())) * config.steps
    with tqdm(total=total, desc="fine-tuning", **terminal.bar_style()) as bar:
        for method, rates in LEARNING_RATES.items():
            for rate in rates:
                bar.set_description(f"{method}, learning rate {rate:.0e}")
                run = fine_tune(
                    config, graphdef, pretrained, old, new, fisher, method, rate, bar
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
