"""From a configuration to all that a training run needs, checked on the way."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from examples.compilation import Stopwatch
from examples.llama.checkpoints.loading import load_model
from examples.llama.evaluation.instructions import check_instructed
from examples.llama.evaluation.items import Items
from examples.llama.evaluation.knowledge import Probe
from examples.llama.evaluation.questions import load_items
from examples.llama.evaluation.short_answers import check_questions
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama
from examples.llama.model.lora import add_lora
from examples.llama.model.loss import next_token_loss
from examples.llama.model.sharding import (
    check_rows,
    make_mesh,
    parameter_sharding,
    replicated,
)
from examples.llama.text.dataset import Dataset
from examples.llama.text.tokenizer import Tokenizer, load_tokenizer
from examples.llama.training import inputs
from examples.llama.training.checks import check
from examples.llama.training.config import Config
from examples.llama.training.fisher import estimate_fisher
from examples.llama.training.importance import (
    Importance,
    find_importance,
    make_importance,
)
from examples.llama.training.measures import Measures
from examples.llama.training.optimizers import (
    MakeOptimizer,
    learning_rates,
    make_optimizer,
)
from examples.llama.training.parsing import same_run
from examples.llama.training.replay import Datasets, add_self_replay, load_data
from examples.llama.training.steps import Fixed, Loss, TrainState, init_state

QUESTIONS = 64  # that are answered in words at each evaluation, at most


class Run(NamedTuple):
    """A run that is ready to start."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    datasets: Datasets
    steps: int
    state: TrainState
    fixed: Fixed
    architecture: LlamaConfig
    graph: nnx.GraphDef  # of the model that trains
    parameters: int  # the model's number of them, without LoRA
    reference: nnx.GraphDef | None  # of the pretrained model, where the loss needs it
    optimizer: optax.GradientTransformation
    loss: Loss
    learning_rates: np.ndarray  # float32 [steps]
    measures: Measures
    importance: Importance | None
    items: Items | None  # on which knowledge is measured
    preparing: float  # seconds in which texts and Fisher information were made


def set_up(
    config: Config,
    say: Callable[[str], None],
    *,
    progress: bool = False,
    optimizer: MakeOptimizer = make_optimizer,
    loss: Loss = next_token_loss,
) -> Run:
    """Loads and builds everything; writes nothing. `progress` shows bars.

    Args: See `loop.train`.

    Raises:
      ValueError, OSError: See `loop.train`.
    """
    check(config)
    if jax.process_index() == 0:  # which may write to it before another one looks
        check_output(config)
    mesh = make_mesh(config.mesh)
    rows = config.batch_size // config.accumulate
    check_rows(rows, mesh, config.mesh)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    datasets = load_data(config, tokenizer, say, progress=progress)
    model = load_model(
        config.model,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        sharding=parameter_sharding(mesh),
    )
    check_model(config, model, datasets)
    probe, questions = None, None
    if config.knowledge is not None:
        items = load_items(config.knowledge)
        questions = items.with_question(QUESTIONS)
        check_questions(model, tokenizer, questions)
        probe = Probe(
            items,
            tokenizer,
            mesh,
            max_position_embeddings=model.config.max_position_embeddings,
        )
    if config.instructions:
        check_instructed(tokenizer)
    # Before the model writes texts, which takes long, so that a bad file is told first.
    found = find_importance(config, nnx.state(model), mesh)
    preparing = Stopwatch()
    with preparing:
        datasets = add_self_replay(
            datasets, config, model, tokenizer, progress=progress
        )
    model.remat = config.remat

    plain_graph, pretrained = nnx.split(model)
    parameters = sum(x.size for x in jax.tree.leaves(pretrained))
    if config.lora_rank:
        add_lora(
            model,
            config.lora_rank,
            config.lora_alpha,
            rngs=nnx.Rngs(config.seed),
            targets=config.lora_modules,
            dropout=config.lora_dropout,
            sharding=parameter_sharding(mesh),
        )
    kind = nnx.LoRAParam if config.lora_rank else nnx.Param
    graph, params, *others = nnx.split(model, kind, ...)
    (frozen,) = others
    if config.reference and not config.lora_rank:
        # A copy, because the training step overwrites the parameters in place.
        pretrained = jax.tree.map(jnp.copy, pretrained)
    measures = Measures(
        graph,
        frozen,
        (plain_graph, pretrained) if config.reference else None,
        held_out=datasets.held_out,
        retained=datasets.retained,
        tokenizer=tokenizer,
        probe=probe,
        questions=questions,
        instructions=config.instructions,
        batch_size=rows,
        mesh=mesh,
    )
    steps = config.steps
    if steps is None:
        assert config.epochs is not None, "check asks for steps or epochs"
        learned = sum(map(len, datasets.training[: datasets.learned]))
        weights = datasets.weights
        replayed = sum(weights) / sum(weights[: datasets.learned])
        examples = learned * replayed
        steps = max(1, math.ceil(config.epochs * examples / config.batch_size))
    rates = learning_rates(config, steps)
    transformation = optimizer(config)
    kinds = config.penalties
    soft = "kl" in kinds or datasets.soft_from is not None
    soft |= config.reference and loss is not next_token_loss
    needed = kinds or soft or config.interpolation is not None
    fisher = None
    if "ewc" in kinds:
        assert datasets.fisher is not None, "check asks for fisher_data"
        with preparing:
            fisher = estimate_fisher(
                plain_graph,
                pretrained,
                datasets.fisher,
                config.fisher_records,
                mesh,
                seed=config.seed,
                progress=progress,
            )
            jax.block_until_ready(fisher)
    with preparing:
        importance = make_importance(
            config,
            plain_graph,
            pretrained,
            params,
            found,
            datasets.written,
            mesh,
            progress=progress,
        )
        jax.block_until_ready(importance and importance.fisher)
    dropout_seed = None
    if config.lora_dropout:
        dropout_seed = jax.device_put(jnp.uint32(config.seed), replicated(mesh))
    return Run(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        datasets=datasets,
        steps=steps,
        state=init_state(transformation, params, mesh),
        fixed=Fixed(
            frozen,
            pretrained if needed else None,
            fisher,
            None if importance is None else importance.fisher,
            dropout_seed,
        ),
        architecture=model.config,
        graph=graph,
        parameters=parameters,
        reference=plain_graph if soft else None,
        optimizer=transformation,
        loss=loss,
        learning_rates=rates,
        measures=measures,
        importance=importance,
        items=None if probe is None else probe.items,
        preparing=preparing.seconds,
    )


def check_output(config: Config) -> None:
    """Raises ValueError unless output is free, or holds this run, not finished."""
    output = config.output
    if (output / "config.json").exists():
        same_run(config, output / "config.json")
        if (output / "result.json").exists():
            raise ValueError(f"{output}: holds this run already, and it is finished")
        if (output / inputs.FILE).exists():
            inputs.check_same(config, output / inputs.FILE)
    elif output.exists():
        # Hidden files are the lock, and what a process left that was killed at once.
        visible = [path for path in output.iterdir() if not path.name.startswith(".")]
        if visible:
            raise ValueError(f"{output}: not empty, and it holds no run to resume")


def by_name(datasets: Datasets) -> dict[str, Dataset]:
    """All data sets that there are, for messages."""
    training = zip(datasets.names, datasets.training, strict=True)
    others = {"eval_data": datasets.held_out, "retain_data": datasets.retained}
    others["fisher_data"] = datasets.fisher
    others |= {f"gem {i}": x for i, x in enumerate(datasets.memories, start=1)}
    return {k: v for k, v in (dict(training) | others).items() if v is not None}


def check_length(config: Config, model: Llama) -> None:
    """Raises ValueError where the rows are longer than the model's positions."""
    model.check_length(config.max_length)


def check_model(config: Config, model: Llama, datasets: Datasets) -> None:
    """Raises ValueError where the tokens do not fit the model."""
    check_length(config, model)
    for name, dataset in by_name(datasets).items():
        if dataset.highest >= model.config.vocab_size:
            raise ValueError(
                f"{name}: the tokenizer gives token {dataset.highest}, the model has "
                f"{model.config.vocab_size}: not its tokenizer"
            )


def describe(run: Run) -> dict[str, Any]:
    """What the configuration does not say: sizes, and what became of the records."""
    facts = {
        "steps": run.steps,
        "mesh": dict(run.mesh.shape),
        "processes": jax.process_count(),
        "parameters": run.parameters,
        "trained_parameters": sum(x.size for x in jax.tree.leaves(run.state.params)),
        "records": {
            name: {
                "rows": len(dataset),
                "truncated": dataset.outcome.truncated,
                "dropped": dataset.outcome.dropped,
                "skipped": dataset.outcome.bad.number,
                "escaped": dataset.outcome.escaped,
                "empty": dataset.outcome.empty.number,
            }
            for name, dataset in by_name(run.datasets).items()
        },
    }
    if run.items is not None:
        facts["knowledge"] = run.items.describe()
    if run.importance is not None:
        facts["fisher_information"] = run.importance.describe()
    return facts


def join_processes(config: Config) -> None:
    """Starts jax.distributed; ValueError where it does not know of what."""
    address = config.coordinator
    if address is not None and ":" not in address:
        raise ValueError(f"coordinator must be HOST:PORT, got {address!r}")
    try:
        jax.distributed.initialize(address, config.processes, config.process_id)
    except ValueError as error:
        raise ValueError(
            f"distributed: {error} Where JAX does not recognise the cluster, give "
            "--coordinator, --processes and --process-id"
        ) from None
