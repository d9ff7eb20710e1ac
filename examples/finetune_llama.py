"""Fine-tune a Llama with MoFO: the whole loop on one page, to read from top to bottom.

python -m examples.finetune_llama --model DIR --data FILE --eval-data FILE
--retain-data FILE --output DIR

It loads a model, learns records of questions and answers, and saves a Hugging Face
directory. Two losses, before and after, show what the model learnt (on held-out
records) and what it forgot (on text such as it was pretrained on).

`python -m examples.llama.train` is what this loop grows into. It adds checkpoints to
resume from, meshes of devices, LoRA, packing, replay, other methods, and reports.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax
import tyro
from flax import nnx
from tqdm import tqdm

from examples import terminal
from examples.checks import check_least
from examples.llama.checkpoints.huggingface import check_destination, save_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.loss import Batch, next_token_loss
from examples.llama.reporting.measured import MEASURES
from examples.llama.text import batches, rows
from examples.llama.text.tokenizer import load_tokenizer, save_tokenizer, tokenizer_path
from mofo_jax import all_but_norms_and_biases, mofo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    model: Path
    """A Hugging Face directory (config.json, safetensors), GGUF or llama2.c file."""
    tokenizer: Path | None = None
    """A directory with tokenizer.json, or a llama2.c tokenizer; else the model's."""
    data: str
    """Records to learn, as JSON lines."""
    eval_data: str
    """Held-out records."""
    retain_data: Path
    """Plain text such as the model was pretrained on."""
    output: Path
    """Directory for the fine-tuned model and its tokenizer."""
    learning_rate: float = 2e-5
    """Learning rate of the first step; it falls to 0 along a cosine."""
    alpha: float = 0.1
    """Fraction of each weight matrix that moves in a step, above 0 and up to 1."""
    steps: int = 100
    """Number of training steps."""
    batch_size: int = 16
    """Rows per step."""
    max_length: int = 512
    """Maximum tokens per row; longer records are truncated."""
    seed: int = 0
    """Seed for the order of the rows."""


def finetune(settings: Settings) -> dict[str, dict[str, float]]:
    """Trains, saves, and returns the losses "before" and "after", by names of MEASURES.

    A ValueError, OSError or FloatingPointError names what is wrong.
    """
    size, length, steps = settings.batch_size, settings.max_length, settings.steps
    check_least("steps", steps, 1)
    check_least("batch_size", size, 1)
    check_destination(settings.output)

    # The model and its tokenizer.
    path = tokenizer_path(settings.tokenizer, settings.model)
    model = load_model(settings.model)
    model.check_length(length)
    tokenizer = load_tokenizer(path, model.config.vocab_size)
    graph, params = nnx.split(model, nnx.Param)

    # Rows of tokens. The loss counts the answers of records, and all tokens of a text.
    records = rows.load_dataset(settings.data, tokenizer, length)
    held_out = rows.load_dataset(settings.eval_data, tokenizer, length)
    retained = rows.load_text(settings.retain_data, tokenizer, length)
    stream = batches.training_batches([records], [1.0], size, settings.seed)
    print(
        f"{len(records):,} records ({records.outcome.truncated:,} truncated, "
        f"{records.outcome.dropped:,} dropped); {steps:,} steps, "
        f"{steps * size / len(records):.2g} epochs"
    )

    # MoFO. This is the line that changes; it was optax.adam(schedule).
    schedule = optax.cosine_decay_schedule(settings.learning_rate, steps)
    optimizer = mofo(schedule, settings.alpha, filter_mask=all_but_norms_and_biases)
    opt_state = optimizer.init(params)

    def mean_loss(params: optax.Params, batch: Batch) -> jax.Array:
        total, count = next_token_loss(nnx.merge(graph, params), batch)
        return total / count

    # Donated inputs give their memory to the outputs, which come in the same order.
    @jax.jit(donate_argnums=(0, 1))
    def train_step(
        params: optax.Params, opt_state: optax.OptState, batch: Batch
    ) -> tuple[optax.Params, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(mean_loss)(params, batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    @jax.jit
    def loss_sum(params: optax.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return next_token_loss(nnx.merge(graph, params), batch)

    def evaluate(params: optax.Params) -> dict[str, float]:
        """The loss per token: what was learnt, and what was forgotten."""
        losses = {}
        for name, dataset in {"eval_loss": held_out, "retain_loss": retained}.items():
            found = [
                loss_sum(params, x) for x in batches.ordered_batches(dataset, size)
            ]
            total, count = np.array(jax.device_get(found), np.float64).sum(axis=0)
            losses[name] = float(total / count)
        return losses

    before = evaluate(params)
    bar = tqdm(range(1, steps + 1), desc="training", **terminal.bar_style())
    for step in bar:
        params, opt_state, loss = train_step(params, opt_state, next(stream))
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {step}; nothing is saved")
    after = evaluate(params)

    print(f"{'':42}{'before':>10}{'after':>10}")
    for name in before:
        print(f"{MEASURES[name].label:42}{before[name]:10.4f}{after[name]:10.4f}")
    save_hugging_face(nnx.merge(graph, params), settings.output, source=settings.model)
    save_tokenizer(tokenizer, settings.output)
    print(f"model: {settings.output}")
    return {"before": before, "after": after}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it with one line."""
    program = "python -m examples.finetune_llama"
    settings = tyro.cli(Settings, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("finetune_llama"):
        finetune(settings)


if __name__ == "__main__":
    main()
