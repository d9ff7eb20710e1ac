"""What divides the steps of a run: the Fisher information of its pretrained model."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from examples.llama.checkpoints.fisher_files import (
    Origin,
    load_fisher,
    named_fisher,
    save_fisher,
)
from examples.llama.model.parameters import named_parameters
from examples.llama.model.sharding import fisher_sharding, replicated, shardings_of
from examples.llama.text.dataset import Dataset
from examples.llama.training.config import SELF, Config
from examples.llama.training.fisher import estimate_fisher
from mofo_jax.continual import FactoredFisher, scale_by_fisher

FILE = "importance.safetensors"


class Importance(NamedTuple):
    """What divides the steps of a run."""

    fisher: Any  # a tree like the trained parameters
    source: str  # as in `Config.importance_source`
    origin: Origin
    made: Any = None  # of all parameters, where this run made it and has to keep it

    def describe(self) -> dict[str, Any]:
        """For run.json and the report."""
        return {"source": self.source, **self.origin._asdict()}


def find_importance(
    config: Config, params: nnx.State, mesh: Mesh
) -> tuple[Any, Origin] | None:
    """What a file holds: that of `config`, or what an earlier part of the run kept.

    Args:
      config: The run's settings.
      params: All parameters of the pretrained model, or their shapes.
      mesh: Where they lie.

    Returns:
      The Fisher information of all parameters and where it comes from; None where
      there is nothing to read.

    Raises:
      ValueError: The file is of another model, or damaged; or there is none, and there
        are several processes.
      OSError: It cannot be read.
    """
    source = config.importance_source
    if source is None:
        return None
    path = config.output / FILE if source == SELF else Path(source)
    if source == SELF and not path.exists():
        if jax.process_count() > 1:
            raise ValueError(
                f"importance {SELF} needs one process, or the {FILE} of a run of one, "
                f"in {config.output}; or give a file of examples.llama.fisher"
            )
        return None
    return load_fisher(path, params, fisher_sharding(mesh))


def make_importance(
    config: Config,
    graph: nnx.GraphDef,
    pretrained: nnx.State,
    params: nnx.State,
    found: tuple[Any, Origin] | None,
    written: Dataset | None,
    mesh: Mesh,
    *,
    progress: bool,
) -> Importance | None:
    """What divides the steps of a run, None where nothing does.

    Args:
      config: The run's settings.
      graph: Of the pretrained model.
      pretrained: All of its parameters.
      params: Those that train.
      found: From `find_importance`.
      written: The model's own texts, where they are needed.
      mesh: Where the parameters lie.
      progress: Whether to show a bar.
    """
    source = config.importance_source
    if source is None:
        return None
    made = None
    if found is None:
        assert written is not None, "own_texts counts what this needs"
        count = config.importance_texts
        made = estimate_fisher(
            graph,
            pretrained,
            written,
            count,
            mesh,
            seed=config.seed,
            factored=True,
            progress=progress,
        )
        name = config.model.resolve().name
        found = made, Origin(name, count, config.max_length, config.seed)
    fisher, origin = found
    if config.lora_rank:
        fisher = jax.jit(_of_lora, out_shardings=replicated(mesh))(fisher, params)
    return Importance(fisher, source, origin, made)


def save_importance(importance: Importance | None, output: Path) -> None:
    """Writes OUTPUT/importance.safetensors, where this run has made what is in it."""
    if importance is not None and importance.made is not None:
        save_fisher(output / FILE, importance.made, importance.origin)


def _of_lora(fisher: Any, params: nnx.State) -> Any:
    """For A [in, rank] and B [rank, out], from the Fisher information of their kernel.

    Their own one would not do: B starts as zero, so that the gradient of A is zero. A
    row of A moves what its row of the kernel does, and a column of B its column. So
    they get the means of the kernel's rows and columns, alike for the whole rank.
    """
    known = named_fisher(fisher)

    def part(name: str, like: jax.Array) -> FactoredFisher:
        module, _, kind = name.rpartition(".")
        kernel = known[f"{module}.kernel"]
        if isinstance(kernel, FactoredFisher):
            rows, columns = map(jnp.asarray, kernel)
        else:
            rows, columns = jnp.mean(kernel, axis=-1), jnp.mean(kernel, axis=-2)

        def alike(x: jax.Array, size: int) -> jax.Array:
            mean = jnp.mean(x, axis=-1, keepdims=True)
            return jnp.broadcast_to(mean, (*mean.shape[:-1], size))

        if kind == "lora_a":
            return FactoredFisher(rows, alike(rows, like.shape[-1]))
        return FactoredFisher(alike(columns, like.shape[-2]), columns)

    leaves = [part(name, like) for name, like in named_parameters(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def step_sizes(
    importance: Importance, params: nnx.State
) -> dict[str, dict[str, float]]:
    """How large the metric makes the steps of each tensor.

    Returns:
      By the tensor's name: "step", the mean factor of its entries relative to that of
      all entries, and "size". LoRA's two tensors are together, as their kernel's.
    """
    metric = scale_by_fisher()

    @jax.jit
    def means(ones: nnx.State, fisher: Any) -> nnx.State:
        steps, _ = metric.update(ones, metric.init(ones), fisher=fisher)
        return jax.tree.map(jnp.mean, steps)

    # Divided among devices as the parameters are.
    shapes: Any = jax.eval_shape(lambda: params)
    make_ones = jax.jit(
        lambda: optax.tree.ones_like(shapes, dtype=jnp.float32),
        out_shardings=shardings_of(params),
    )
    found = named_parameters(jax.device_get(means(make_ones(), importance.fisher)))
    sums: dict[str, list[float]] = {}
    for name, like in named_parameters(params).items():
        kernel = name.replace("lora_a", "kernel").replace("lora_b", "kernel")
        total = sums.setdefault(kernel, [0.0, 0.0])
        total[0] += float(found[name]) * like.size
        total[1] += like.size
    step, size = np.sum(list(sums.values()), axis=0)
    return {
        name: {"step": float(total / count / (step / size)), "size": count}
        for name, (total, count) in sums.items()
    }
