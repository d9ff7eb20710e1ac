"""What a run leaves behind: the model or its adapter, sample answers and the report."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from examples.files import write_json
from examples.llama.checkpoints.adapter import save_adapter
from examples.llama.checkpoints.directories import write_sums
from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.evaluation.answers import complete
from examples.llama.model.llama import Llama
from examples.llama.model.lora import merge_lora
from examples.llama.model.sharding import shardings_of
from examples.llama.reporting.report import plot_losses, write_report
from examples.llama.text.tokenizer import save_tokenizer
from examples.llama.training.config import Config
from examples.llama.training.importance import step_sizes
from examples.llama.training.log import read_metrics
from examples.llama.training.parsing import settings
from examples.llama.training.setup import Run, describe
from examples.llama.training.steps import TrainState
from mofo_jax.continual import interpolate

SAMPLE_TOKENS = 96


def trained_model(run: Run, params: nnx.State) -> Llama:
    """The model with these parameters, with LoRA beside its weights where it trains."""
    return nnx.merge(run.graph, params, run.fixed.frozen)


def interpolated(run: Run, state: TrainState) -> TrainState:
    """The state between the pretrained and the trained weights, where that is asked.

    The layers' weights go in equal steps from the first one's to the last one's. The
    embedding has that of the first layer, the last norm and the head that of the last.
    """
    if run.config.interpolation is None:
        return state
    first, last = run.config.interpolation
    layers = run.architecture.num_hidden_layers

    def weight(name: str) -> float:
        if name.startswith("embed_tokens"):
            return first
        number = re.match(r"layers/(\d+)/", name)
        if number is None:
            return last
        return first + (last - first) * int(number[1]) / max(1, layers - 1)

    between = jax.jit(
        functools.partial(interpolate, weight=weight),
        out_shardings=shardings_of(state.params),
    )
    return state._replace(params=between(run.fixed.pretrained, state.params))


def sample(run: Run, params: nnx.State) -> list[dict[str, str]]:
    """The likeliest answers to the first questions, with the expected ones.

    Of held-out records where there are any. In several processes there are none: each
    would have to hold all parameters.
    """
    if jax.process_count() > 1 or not run.config.samples:
        return []
    model, tokenizer = trained_model(run, params), run.tokenizer
    held_out = run.datasets.held_out
    dataset = run.datasets.training[0] if held_out is None else held_out
    # The first text of a row, up to the first token that counts, and the rest.
    texts, prompts = [], []
    for row in range(min(run.config.samples, len(dataset))):
        tokens, loss_mask, lengths, _ = dataset[row]
        begin = int(np.argmax(loss_mask))
        prompts.append(tokens[:begin])
        texts.append(tokens[begin : lengths[0]])
    length = max(map(len, prompts))
    room = model.config.max_position_embeddings - length
    if room < 1:
        return []
    answers = complete(
        model, tokenizer, prompts, max_new_tokens=min(SAMPLE_TOKENS, room)
    )
    return [
        {
            "prompt": tokenizer.decode(prompt.tolist()),
            "expected": tokenizer.decode(text.tolist()),
            "answer": answer.text,
        }
        for prompt, text, answer in zip(prompts, texts, answers, strict=True)
    ]


def exports(config: Config) -> list[Path]:
    """The directories that a run's results are in: an adapter, a model, or both."""
    names = ["adapter"] if config.lora_rank else []
    names += ["model"] if config.lora_merge or not config.lora_rank else []
    return [config.output / name for name in names]


def export(run: Run, params: nnx.State) -> None:
    """Writes the directories of `exports`, each with the tokenizer."""
    config, model = run.config, trained_model(run, params)
    for directory in exports(config):
        if directory.name == "adapter":
            save_adapter(model, directory, base=config.model.resolve())
        else:
            merge_lora(model)
            dtype = config.export_dtype or config.param_dtype
            save_hugging_face(model, directory, dtype=dtype, source=config.model)
        if jax.process_index() == 0:
            save_tokenizer(run.tokenizer, directory)
            write_sums(directory)


def finish(
    run: Run,
    state: TrainState,
    evaluations: dict[int, dict[str, float]],
    speed: dict[str, Any],
) -> dict[str, Any]:
    """Exports what was trained and writes the report; returns what `train` does.

    Args:
      run: The run.
      state: After its last step.
      evaluations: By step; those of step 0 and of the last step are the results.
      speed: What `train` returns besides them.
    """
    config, output = run.config, run.config.output
    export(run, state.params)
    # All processes take part in the reductions of this, though one alone writes.
    per_tensor = run.measures.per_tensor(state.params) if config.report else {}
    importance, steps = run.importance, None
    if config.report and importance is not None:
        steps = step_sizes(importance, state.params)
    result = {"before": evaluations[0], "after": evaluations[run.steps], **speed}
    if jax.process_index() > 0:
        return result
    if config.report:
        metrics = read_metrics(output / "metrics.jsonl")
        samples = json.loads((output / "samples.json").read_text())
        for line, later in zip(samples, sample(run, state.params), strict=True):
            line["before"], line["after"] = line.pop("answer"), later["answer"]
        plot_losses(metrics, output / "losses.png")
        write_report(
            output / "report.html",
            title=f"{config.method} on {', '.join(run.datasets.names)}",
            config=settings(config) | describe(run),
            metrics=metrics,
            before=result["before"],
            after=result["after"] | speed,
            per_tensor=per_tensor,
            samples=samples,
            importance=None if importance is None else importance.describe(),
            steps=steps,
        )
    write_json(output / "result.json", result)
    return result
