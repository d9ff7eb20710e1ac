"""When MoFO keeps more than AdamW at the same loss: the quickstart's facts, varied.

python -m benchmarks.facts --output docs/results/facts.json

Teaches the quickstart's small Llama new facts and counts the old ones that it keeps:
with other alphas, blocks and scores, in the pretrained model's metric, with masks that
persist, schedules of alpha, noisier batches, more steps, larger tasks and models, each
along its learning rates and with several seeds, which also make the facts. Writes every
number as JSON after every run, and beside it a table and a plot at matched losses.
Started again, it resumes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from tqdm import tqdm

from benchmarks.facts_optimizers import Context
from benchmarks.facts_report import plot, report
from benchmarks.facts_variants import VARIANTS, Variant
from benchmarks.outputs import load, make_room, publish
from examples import quickstart, terminal
from examples.checks import check_least, check_name
from examples.environment import environment
from examples.files import write_json
from mofo_jax import distance
from mofo_jax.continual import forward_kl, interpolate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write; table and plot go beside it, ending in .md and .png."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Names among those of benchmarks/facts_variants.py."""
    seeds: int = 5
    """Worlds of facts, with a model each."""


def measure(args: Args) -> dict[str, Any]:
    """Trains what `args.output` does not hold yet, and writes that after every run.

    Returns:
      "runs", a list of the variant, its rate and seed, the "loss" on the new facts, the
      shares of "new_facts" and "old_facts" recalled, "kl" from the pretrained model on
      the old facts in nats, "distance" and "touched", and the device and versions.

    Raises:
      ValueError: An unknown variant, no seed, or `args.output` is of something else.
    """
    check_least("seeds", args.seeds, 1)
    for name in args.variants:
        check_name("variants", name, VARIANTS)
    keys = ("variant", "rate", "seed")
    results = load(args.output, {}, keys) or {"runs": []}
    done = {tuple(run[key] for key in keys) for run in results["runs"]}
    wanted = [
        (name, rate, seed)
        for seed in range(args.seeds)
        for name in args.variants
        for rate in VARIANTS[name].rates
    ]
    missing = [run for run in wanted if run not in done]
    start = len(wanted) - len(missing)
    models: dict[Any, Any] = {}
    with tqdm(total=len(wanted), initial=start, **terminal.bar_style()) as bar:
        for name, rate, seed in missing:
            variant = VARIANTS[name]
            world = quickstart.Config(
                seed=seed,
                new_names=variant.new_names,
                hidden_size=variant.hidden_size,
                pretraining_steps=6000,
            )
            if world not in models:
                models.clear()  # seeds come one after another, and sizes are few
                old, new = quickstart.make_world(seed, variant.new_names)
                models[world] = old, new, *quickstart.pretrain(world, old)
            found = run_one(variant, rate, seed, *models[world])
            run = {"variant": name, "rate": rate, "seed": seed}
            results["runs"].append(run | found | environment())
            write_json(args.output, results)
            bar.set_description(f"{name} {rate} seed {seed}")
            bar.set_postfix_str(
                f"loss {found['loss']:.3f}, kept {found['old_facts']:.0%}",
                refresh=False,
            )
            bar.update()
    return results


def run_one(
    variant: Variant,
    rate: float,
    seed: int,
    old: jax.Array,
    new: jax.Array,
    graphdef: Any,
    pretrained: Any,
) -> dict[str, float]:
    """Fine-tunes by a variant and measures what the model then knows."""
    key, importance = jax.random.key(seed), None
    if variant.importance:
        importance = quickstart.own_fisher(
            key, graphdef, pretrained, old, factored=variant.importance == "factored"
        )
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
        params = _fine_tune(
            key, rate, old, new, pretrained, importance, graphdef, variant
        )
    if variant.interpolate is not None:
        params = interpolate(pretrained, params, variant.interpolate)
    before = quickstart.value_logits(graphdef, pretrained, old)
    after = quickstart.value_logits(graphdef, params, old)
    changed = jax.tree.map(lambda x, y: jnp.sum(x != y), params, pretrained)
    size = sum(x.size for x in jax.tree.leaves(params))
    return {
        "loss": float(quickstart.loss_fn(params, graphdef, new)),
        "new_facts": float(quickstart.recall(params, graphdef, new)),
        "old_facts": float(quickstart.recall(params, graphdef, old)),
        "kl": float(jnp.mean(forward_kl(after, before))),
        "distance": float(distance(params, pretrained)),
        "touched": sum(map(int, jax.tree.leaves(changed))) / size,
    }


@jax.jit(static_argnames=("graphdef", "variant"))
def _fine_tune(
    key: jax.Array,
    rate: jax.Array,
    old: jax.Array,
    new: jax.Array,
    pretrained: Any,
    importance: Any,
    graphdef: Any,
    variant: Variant,
) -> Any:
    # Of the old facts only the prompts are used: the answers are the model's own.
    own = quickstart.value_logits(graphdef, pretrained, old)
    schedule = optax.linear_schedule(1.0, 0.0, variant.steps)
    context = Context(rate, schedule, pretrained, importance)
    optimizer = variant.optimizer(context)

    def loss_fn(params: Any, facts: jax.Array, rows: jax.Array) -> jax.Array:
        loss = quickstart.loss_fn(params, graphdef, facts)
        if variant.self_replay:
            now = quickstart.value_logits(graphdef, params, old[rows])
            loss += variant.self_replay * jnp.mean(forward_kl(now, own[rows]))
        return loss

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        facts, keys = new, jax.random.split(key)
        if variant.batch_size:
            chosen = jax.random.choice(
                keys[0], len(new), (variant.batch_size,), replace=False
            )
            facts = new[chosen]
        rows = jax.random.randint(keys[1], (len(new),), 0, len(old))
        gradients = jax.grad(loss_fn)(params, facts, rows)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = pretrained, optimizer.init(pretrained)
    (params, _), _ = jax.lax.scan(step, start, jax.random.split(key, variant.steps))
    return params


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it as they end examples.llama.train."""
    program = "python -m benchmarks.facts"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("facts"):
        make_room(args.output)
        publish(measure(args), args.output, report, plot)


if __name__ == "__main__":
    main()
