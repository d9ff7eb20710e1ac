"""Estimates of the Fisher information of a model, on rows and on its own texts."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from examples import terminal
from examples.llama.checkpoints.fisher_files import named_fisher
from examples.llama.model.llama import Llama
from examples.llama.model.loss import predict, probe_sum
from examples.llama.model.sharding import fisher_sharding, replicated
from examples.llama.text.batches import ordered_batches
from examples.llama.text.dataset import Batch, Dataset
from examples.llama.text.tokenizer import Tokenizer
from examples.llama.training.own_texts import drawing, text_rows
from mofo_jax.continual import FactoredFisher, fisher_diagonal, self_fisher

_SIGNS = 1 << 16  # apart from the keys with which the texts of a seed are drawn


def estimate_fisher(
    graph: nnx.GraphDef,
    params: nnx.State,
    dataset: Dataset,
    count: int,
    mesh: Mesh,
    *,
    seed: int,
    factored: bool = False,
    progress: bool = False,
) -> Any:
    """The Fisher information of the first `count` rows, each by itself.

    It is that of the model's predictions where tokens count: of all next tokens that
    are possible, not only of those in the rows. The seed is that of the random signs of
    `fisher_probe`.
    """
    gradient = row_gradient(graph, mesh, seed)
    rows = itertools.islice(ordered_batches(dataset, 1), count)
    with _bar(min(count, len(dataset)), progress) as bar:

        def counted(params: nnx.State, row: Batch) -> nnx.State:
            found = jax.block_until_ready(gradient(params, row))
            bar.update()
            return found

        fisher = fisher_diagonal(counted, params, rows, factored=factored)
    return _placed(fisher, mesh)


def estimate_self_fisher(
    model: Llama,
    tokenizer: Tokenizer,
    count: int,
    length: int,
    mesh: Mesh,
    *,
    seed: int,
    factored: bool = True,
    progress: bool = False,
) -> Any:
    """The Fisher information of a model on texts that it writes meanwhile.

    It is that of `estimate_fisher` on the texts of `own_texts.write_texts`.

    Raises:
      ValueError: See `own_texts.drawing`.
    """
    graph, params = nnx.split(model)
    gradient = row_gradient(graph, mesh, seed)
    options = drawing(model, tokenizer, length, seed)
    draw = options.pop("sample")

    def text_gradient(params: nnx.State, text: np.ndarray) -> nnx.State:
        rows = text_rows([text.tolist()], length, tokenizer.pad_id)
        return gradient(params, next(ordered_batches(rows, 1)))

    with _bar(count, progress) as bar:
        name = bar.desc

        def sample(prompts: np.ndarray, key: jax.Array) -> np.ndarray:
            bar.set_description("writing")
            new = np.asarray(draw(prompts, key))
            bar.set_description(name)
            if not bar.n:  # the time left is for texts like those that follow
                bar.unpause()
            return new

        fisher = self_fisher(
            text_gradient,
            params,
            sample,
            count,
            factored=factored,
            progress=lambda done, _: bar.update(done - bar.n),
            **options,
        )
    return _placed(fisher, mesh)


def _bar(total: int, progress: bool) -> Any:
    style = terminal.bar_style() | {"smoothing": 0}
    return tqdm(total=total, desc="Fisher information", disable=not progress, **style)


def row_gradient(
    graph: nnx.GraphDef, mesh: Mesh, seed: int
) -> Callable[[nnx.State, Batch], nnx.State]:
    """What `fisher_diagonal` squares, of one row after another, each a batch of one.

    The seed is that of the random signs of `fisher_probe`.
    """

    gradient = probe_gradient(graph)
    rows = itertools.count()
    first = jax.random.fold_in(jax.random.key(seed), _SIGNS)

    def on_mesh(params: nnx.State, row: Batch) -> nnx.State:
        # A row goes to all devices, of which each has its part of the parameters.
        key = jax.random.fold_in(first, next(rows))
        placed = jax.device_put((row, key), replicated(mesh))
        with jax.numpy_dtype_promotion("standard"):  # as in compile_step
            return gradient(params, *placed)

    return on_mesh


def probe_gradient(
    graph: nnx.GraphDef,
) -> Callable[[nnx.State, dict[str, jax.Array], jax.Array], nnx.State]:
    """The gradient of `fisher_probe` of a batch of one row, by parameters and key."""

    @jax.jit
    def gradient(
        params: nnx.State, row: dict[str, jax.Array], key: jax.Array
    ) -> nnx.State:
        def probe(params: nnx.State) -> jax.Array:
            model = nnx.merge(graph, params)
            hidden, _, mask = predict(model, row, packed=False)
            return probe_sum(hidden, model.head(), mask, key)

        return jax.grad(probe)(params)

    return gradient


def _placed(fisher: Any, mesh: Mesh) -> Any:
    """Lying where `load_fisher` would put it, so that a resumed run computes alike."""
    sharding = fisher_sharding(mesh)

    def put(name: str, leaf: Any) -> Any:
        if isinstance(leaf, FactoredFisher):
            return FactoredFisher(*jax.device_put(tuple(leaf), replicated(mesh)))
        return jax.device_put(leaf, sharding(name, leaf.shape))

    leaves = [put(name, leaf) for name, leaf in named_fisher(fisher).items()]
    tree = jax.tree.structure(fisher, is_leaf=lambda x: isinstance(x, FactoredFisher))
    return jax.tree.unflatten(tree, leaves)
