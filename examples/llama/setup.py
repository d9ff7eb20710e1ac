"""From a configuration to all that a training run needs, checked on the way."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from examples.llama import data
from examples.llama.architectures import LlamaConfig
from examples.llama.config import Config, check, same_run
from examples.llama.convert import load_model
from examples.llama.lora import add_lora
from examples.llama.measures import Measures
from examples.llama.model import Llama
from examples.llama.optimizers import Schedule, make_optimizer, make_schedule
from examples.llama.records import parse_mixture
from examples.llama.sharding import batch_rows, make_mesh, parameter_sharding
from examples.llama.steps import TrainState, init_state
from examples.llama.tokenizer import Tokenizer, load_tokenizer


class Datasets(NamedTuple):
    names: list[str]  # of the files to learn from, and so the next two
    training: list[data.Dataset]
    weights: list[float]
    held_out: data.Dataset | None
    retained: data.Dataset | None


class Run(NamedTuple):
    """A run that is ready to start."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    datasets: Datasets
    steps: int
    state: TrainState
    frozen: nnx.State  # parameters that do not train
    architecture: LlamaConfig
    graph: nnx.GraphDef  # of the model that trains
    plain: tuple[nnx.GraphDef, nnx.State]  # of it without LoRA, shapes only
    lora_scale: float
    optimizer: optax.GradientTransformation
    schedule: Schedule
    measures: Measures


def set_up(config: Config, say: Callable[[str], None]) -> Run:
    """Loads and builds everything; writes nothing.

    Raises:
      ValueError, OSError: As of `train`.
    """
    check(config)
    if jax.process_index() == 0:  # which may write to it before another one looks
        check_output(config)
    mesh = make_mesh(config.mesh)
    rows, among = config.batch_size // config.accumulate, batch_rows(mesh)
    if rows % among:
        raise ValueError(
            f"batch_size / accumulate must be a multiple of {among}, over which the "
            f"mesh {config.mesh} divides it, got {rows}"
        )
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    datasets = load_data(config, tokenizer, say)
    model = load_model(
        config.model,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        sharding=parameter_sharding(mesh),
    )
    check_model(config, model, datasets)
    model.remat = config.remat

    plain_graph, pretrained = nnx.split(model)
    plain = plain_graph, jax.eval_shape(lambda: pretrained)
    if config.lora_rank:
        add_lora(
            model,
            config.lora_rank,
            config.lora_alpha,
            rngs=nnx.Rngs(config.seed),
            sharding=parameter_sharding(mesh),
        )
    kind = nnx.LoRAParam if config.lora_rank else nnx.Param
    graph, params, frozen = nnx.split(model, kind, ...)
    if config.reference and not config.lora_rank:
        # A copy, because the training step overwrites the parameters in place.
        pretrained = jax.tree.map(jnp.copy, pretrained)
    lora_scale = config.lora_alpha / max(1, config.lora_rank)
    measures = Measures(
        graph,
        frozen,
        (plain_graph, pretrained) if config.reference else None,
        lora_scale=lora_scale,
        held_out=datasets.held_out,
        retained=datasets.retained,
        batch_size=rows,
        mesh=mesh,
    )
    steps = config.steps
    if steps is None:
        examples = sum(map(len, datasets.training))
        steps = max(1, math.ceil(config.epochs * examples / config.batch_size))
    optimizer = make_optimizer(config, steps)
    return Run(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        datasets=datasets,
        steps=steps,
        state=init_state(optimizer, params, config.seed, mesh),
        frozen=frozen,
        architecture=model.config,
        graph=graph,
        plain=plain,
        lora_scale=lora_scale,
        optimizer=optimizer,
        schedule=make_schedule(config, steps),
        measures=measures,
    )


def check_output(config: Config) -> None:
    """Raises ValueError unless output is free, or holds this run, not finished."""
    output = config.output
    if (output / "config.json").exists():
        same_run(config, output / "config.json")
        if (output / "result.json").exists():
            raise ValueError(f"{output}: holds this run already, and it is finished")
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: not empty, and it holds no run to go on with")


def load_data(
    config: Config, tokenizer: Tokenizer, say: Callable[[str], None]
) -> Datasets:
    """All records and texts as tokens; says how many were cut, dropped or skipped."""

    def load(path: str, pack: bool) -> data.Dataset:
        found = data.load_dataset(
            path,
            tokenizer,
            config.max_length,
            pack=pack,
            template=config.template,
            skip_bad=config.skip_bad_records,
        )
        say(
            f"{path}: {len(found)} rows of up to {config.max_length} tokens; "
            f"{found.truncated} records cut, {found.dropped} dropped for no answer "
            f"token was left, {len(found.bad)} malformed ones skipped"
        )
        for reason in found.bad[:3]:
            say(f"  {reason}")
        return found

    mixture = [parse_mixture(text) for text in config.data]
    held_out = retained = None
    names, weights = map(list, zip(*mixture, strict=True))
    training = [load(path, config.pack) for path in names]
    if config.eval_data is not None:
        held_out = load(config.eval_data, False)
    if config.retain_data is not None:
        retained = data.load_text(config.retain_data, tokenizer, config.max_length)
    return Datasets(names, training, weights, held_out, retained)


def by_name(datasets: Datasets) -> dict[str, data.Dataset]:
    """All data sets that there are, for messages."""
    training = zip(datasets.names, datasets.training, strict=True)
    others = {"eval_data": datasets.held_out, "retain_data": datasets.retained}
    return {k: v for k, v in (dict(training) | others).items() if v is not None}


def check_model(config: Config, model: Llama, datasets: Datasets) -> None:
    """Raises ValueError where the tokens do not fit the model."""
    limit = model.config.max_position_embeddings
    if config.max_length > limit:
        raise ValueError(
            f"max_length must be up to the model's {limit}, got {config.max_length}"
        )
    for name, dataset in by_name(datasets).items():
        if (highest := dataset.tokens.max()) >= model.config.vocab_size:
            raise ValueError(
                f"{name}: the tokenizer gives token {highest}, the model has "
                f"{model.config.vocab_size}: not its tokenizer"
            )


def describe(run: Run) -> dict[str, Any]:
    """What the configuration does not say: sizes, and what became of the records."""
    return {
        "steps": run.steps,
        "mesh": dict(run.mesh.shape),
        "processes": jax.process_count(),
        "parameters": sum(x.size for x in jax.tree.leaves(run.plain[1])),
        "trained_parameters": sum(x.size for x in jax.tree.leaves(run.state.params)),
        "records": {
            name: {
                "rows": len(dataset),
                "truncated": dataset.truncated,
                "dropped": dataset.dropped,
                "skipped": len(dataset.bad),
            }
            for name, dataset in by_name(run.datasets).items()
        },
    }
