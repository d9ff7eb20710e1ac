"""Fine-tune a Llama with MoFO or AdamW, and see what it learns and what it forgets.

Trains on the answers of GSM8K's records. Before, on the way and after, measures the
loss on held-out answers and on text such as the model was pretrained on, and the
distance from the pretrained weights. The output directory gets config.json,
metrics.jsonl, losses.png and the model.
"""

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
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
from examples.llama import data
from examples.llama.checkpoint import load_model, save_model
from examples.llama.tokenizer import load_llama2c_tokenizer
from mofo_jax import all_but_norms_and_biases, distance, mofo

OUTPUTS = ("config.json", "metrics.jsonl", "losses.png", "model")
MEASURES = {
    "eval_loss": "held-out loss (nats per answer token)",
    "retain_loss": "retained-text loss (nats per token)",
    "distance": "distance from the pretrained weights",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: Path
    """A llama2.c checkpoint, or a directory that was saved from training."""
    tokenizer: Path
    """Its tokenizer, in llama2.c's format."""
    data: Path
    """Records to learn: JSON lines with "question" and "answer", as GSM8K's."""
    eval_data: Path
    """Held-out records, of the same form."""
    retain_data: Path
    """Plain text such as the model was pretrained on, on which forgetting shows."""
    output: Path
    """Directory for the results, which must not hold a run yet."""
    # A plain str, so that `check` names an unknown method in one line.
    method: Annotated[str, tyro.conf.arg(metavar="{adamw,mofo}")] = "mofo"
    """The optimizer."""
    alpha: float = 0.1
    """MoFO's fraction of each parameter that moves in a step, above 0 and up to 1."""
    learning_rate: float = 1e-3
    """At its peak; it follows a cosine down to 0 at the last step."""
    steps: int = 400
    """Training steps."""
    batch_size: int = 16
    """Records per step."""
    max_length: int = 256
    """Tokens per record, of which longer ones keep the first; and per text window."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of every entry and with either method."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to its peak."""
    seed: int = 0
    """Of the order of the records."""
    eval_every: int = 100
    """Steps between evaluations."""


def check(config: Config) -> None:
    """Raises ValueError or OSError for what is wrong before anything is loaded."""
    if config.method not in ("adamw", "mofo"):
        raise ValueError(f"method must be adamw or mofo, got {config.method!r}")
    if not 0 < config.alpha <= 1:
        raise ValueError(f"alpha must be above 0 and up to 1, got {config.alpha}")
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be above 0, got {config.learning_rate}")
    if not 0 <= config.weight_decay < math.inf:
        raise ValueError(f"weight_decay must be 0 or above, got {config.weight_decay}")
    least_of = {"steps": 1, "batch_size": 1, "max_length": 2, "eval_every": 1}
    for name, least in {**least_of, "warmup_steps": 0, "seed": 0}.items():
        if (value := getattr(config, name)) < least:
            raise ValueError(f"{name} must be {least} or above, got {value}")
    if (warmup := config.warmup_steps) >= (steps := config.steps):
        raise ValueError(f"warmup_steps must be below {steps} steps, got {warmup}")
    for name in ("model", "tokenizer", "data", "eval_data", "retain_data"):
        getattr(config, name).stat()  # the error names the file
    output = config.output.absolute()
    for name in OUTPUTS:
        if (output / name).exists():
            raise ValueError(f"{config.output}: holds a run already, in {name}")
    existing = next(p for p in (output, *output.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{config.output}: cannot write to {existing}")


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer with its schedule: cosine decay to 0, warm-up before it if any."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
    )
    adam = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": config.weight_decay}
    if config.method == "adamw":
        return optax.adamw(schedule, **adam)
    # Norms get plain Adam, as in the authors' released code.
    return mofo(schedule, config.alpha, filter_mask=all_but_norms_and_biases, **adam)


def train(config: Config, *, progress: bool = True) -> dict[str, Any]:
    """Runs what `config` describes, with a bar and printed evaluations if `progress`.

    Returns:
      "before" and "after", each a dictionary of "eval_loss" (nats per answer token,
      over all held-out records), "retain_loss" (nats per token) and "distance", which
      a rerun gives again; and "seconds" of training, without compilation and
      evaluation, "milliseconds_per_step" and "tokens_per_second".

    Raises:
      ValueError, OSError: Something is wrong with the configuration or a file. Nothing
        has been written, unless the disk failed later on.
      FloatingPointError: A loss or the distance is not finite. The metrics are kept.
    """
    say = tqdm.write if progress else lambda _: None
    check(config)
    model = load_model(config.model)
    length, context = config.max_length, model.config.max_position_embeddings
    if length > context:
        raise ValueError(
            f"max_length must be up to the model's {context}, got {length}"
        )
    tokenizer = load_llama2c_tokenizer(config.tokenizer, model.config.vocab_size)
    training = data.load_gsm8k(config.data, tokenizer, length)
    held_out = data.load_gsm8k(config.eval_data, tokenizer, length)
    retained = data.load_text(config.retain_data, tokenizer, length)
    batches = data.shuffled_batches(training, config.batch_size, config.seed)
    for path, found in ((config.data, training), (config.eval_data, held_out)):
        say(
            f"{path.name}: {len(found.tokens)} records, {found.truncated} of them cut "
            f"to {length} tokens; {found.dropped} dropped, no answer left"
        )

    graph, params = nnx.split(model)
    # A copy, because the training step overwrites the parameters in place.
    pretrained = jax.tree.map(jnp.copy, params)
    optimizer = make_optimizer(config)
    opt_state = optimizer.init(params)

    @jax.jit
    def loss_sum(params, tokens, mask):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses, where=mask[:, 1:])

    def mean_loss(params, tokens, mask):
        return loss_sum(params, tokens, mask) / jnp.sum(mask, dtype=jnp.float32)

    # Outputs in the order of the donated inputs: each reuses its predecessor's buffer.
    def train_step(params, opt_state, tokens, mask):
        loss, gradients = jax.value_and_grad(mean_loss)(params, tokens, mask)
        # Optax mixes dtypes (decay**count), which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def mean_loss_of_all(dataset: data.Dataset) -> float:
        batches = data.ordered_batches(dataset, config.batch_size)
        sums = [loss_sum(params, tokens, mask) for tokens, mask in batches]
        total = np.sum(jax.device_get(sums), dtype=np.float64)
        return float(total / dataset.mask.sum())

    config.output.mkdir(parents=True, exist_ok=True)
    write_config(config, {"data": training, "eval_data": held_out})
    lines = (config.output / "metrics.jsonl").open("x")
    show = {"total": config.steps, "mininterval": 0, "disable": not progress}
    with lines as metrics, tqdm(**show, **terminal.bar_style()) as bar:

        def log(step: int, values: dict[str, float]) -> None:
            """Writes a line of metrics.jsonl, and stops the run at a loss like NaN."""
            odd = [name for name, x in values.items() if not math.isfinite(x)]
            line = values | dict.fromkeys(odd)  # JSON has null for them
            print(json.dumps({"step": step} | line), file=metrics, flush=True)
            if odd:
                raise FloatingPointError(f"{odd[0]} is {values[odd[0]]} at step {step}")

        def evaluate(step: int) -> dict[str, float]:
            bar.set_description("evaluating")
            values = {
                "eval_loss": mean_loss_of_all(held_out),
                "retain_loss": mean_loss_of_all(retained),
                "distance": float(jax.jit(distance)(params, pretrained)),
            }
            log(step, values)
            say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
            bar.set_description("training")
            return values

        before = evaluate(0)
        example = next(data.ordered_batches(training, config.batch_size))
        run_step = jax.jit(train_step, donate_argnums=(0, 1))
        run_step = run_step.lower(params, opt_state, *example).compile()
        bar.unpause()  # what came before does not count in the time left

        pending: dict[int, jax.Array] = {}  # losses by step, still on the device
        seconds, tokens_seen, refresh_at = 0.0, 0, 1
        started = time.perf_counter()
        for step, batch in enumerate(itertools.islice(batches, config.steps), start=1):
            params, opt_state, pending[step] = run_step(params, opt_state, *batch)
            tokens_seen += np.count_nonzero(batch[0] != data.PAD)
            due = step % config.eval_every == 0 or step == config.steps
            if step < refresh_at and not due:
                continue  # the next step is queued while this one still runs
            for done, loss in jax.device_get(pending).items():
                log(done, {"loss": float(loss)})
            pending.clear()
            seconds += time.perf_counter() - started
            started = time.perf_counter()
            # Some five times a second, in steps: by the clock alone, the host would
            # queue steps far ahead of the device.
            refresh_at = step + max(1, int(0.2 * step / seconds))
            rate = tokens_seen / seconds
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update(step - bar.n)
            if due:
                after = evaluate(step)
                bar.unpause()
                started = time.perf_counter()

    nnx.update(model, params)
    save_model(model, config.output / "model")
    plot(config.output / "metrics.jsonl", config.output / "losses.png")
    say(f"{'':38}{'before':>9}{'after':>9}")
    for name, title in MEASURES.items():
        say(f"{title:38}{before[name]:9.4f}{after[name]:9.4f}")
    return {
        "before": before,
        "after": after,
        "seconds": seconds,
        "milliseconds_per_step": 1000 * seconds / config.steps,
        "tokens_per_second": tokens_seen / seconds,
    }


def write_config(config: Config, datasets: dict[str, data.Dataset]) -> None:
    """Writes config.json: every setting, what became of the records, and versions."""
    values: dict[str, Any] = dataclasses.asdict(config)
    for name, value in values.items():
        values[name] = str(value.resolve()) if isinstance(value, Path) else value
    values["records"] = {
        name: {"kept": len(d.tokens), "truncated": d.truncated, "dropped": d.dropped}
        for name, d in datasets.items()
    }
    text = json.dumps(values | environment(), indent=2)
    (config.output / "config.json").write_text(text + "\n")


def environment() -> dict[str, Any]:
    """What a run's numbers depend on besides its configuration."""
    versions = {name: version(name) for name in ("jax", "optax", "flax")}
    return {"device": jax.devices()[0].device_kind, "versions": versions}


def plot(metrics: Path, image: Path) -> None:
    """Draws the losses of a metrics.jsonl over the steps, as a PNG."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = {
        name: list(
            zip(*[(x["step"], x[name]) for x in lines if name in x], strict=True)
        )
        for name in ("loss", "eval_loss", "retain_loss")
    }
    blue, orange = "#0072b2", "#d55e00"  # of Okabe and Ito's palette
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*losses["loss"], color=blue, linewidth=1, label="training, each batch")
    left.plot(*losses["eval_loss"], "o", color=orange, label="held-out records")
    left.set(title="Fine-tuning", ylabel="loss (nats per answer token)")
    left.legend()
    right.plot(*losses["retain_loss"], "s-", color=orange)
    right.set(
        title="Retained text: rising is forgetting", ylabel="loss (nats per token)"
    )
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(image)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: exit code 2 for a bad argument or file, 1 for an odd loss."""
    program = "python -m examples.llama.train"
    config = tyro.cli(Config, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("train"):
        train(config)


if __name__ == "__main__":
    main()
