"""The method keep in other metrics, and with other scores, for the ablation.

What the trainer does not have is made with the optimizer, before the first step, and is
a constant of the compiled one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.forgetting_optimizers import at_unit_scale, keep_in
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.llama import Llama
from examples.llama.model.sharding import make_mesh
from examples.llama.text.batches import ordered_batches
from examples.llama.text.dataset import Dataset
from examples.llama.text.tokenizer import load_tokenizer
from examples.llama.training.config import Config
from examples.llama.training.fisher import (
    estimate_fisher,
    probe_gradient,
    row_gradient,
)
from examples.llama.training.optimizers import (
    MakeOptimizer,
    in_metric,
    scale_by_given_learning_rate,
)
from examples.llama.training.own_texts import text_rows, write_texts
from mofo_jax import all_but_norms_and_biases, filter_by_momentum
from mofo_jax.continual import scale_by_fisher

DAMPING = 0.01  # relative to the mean of the diagonal, as that of `scale_by_fisher`


class Own(NamedTuple):
    """A pretrained model, and rows with texts that it wrote."""

    model: Llama
    rows: Dataset


def own_texts(
    config: Config,
    count: int | None = None,
    length: int | None = None,
    temperature: float = 1.0,
) -> Own:
    """The model of a run, and texts of as many as the run draws, or as given."""
    model = load_model(config.model)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    count, length = count or config.importance_texts, length or config.max_length
    texts = write_texts(
        model, tokenizer, count, length, seed=config.seed, temperature=temperature
    )
    return Own(model, text_rows(texts, length, tokenizer.pad_id))


def _fisher(own: Own, config: Config, *, factored: bool) -> Any:
    """As the run would estimate it, the mean over the texts."""
    return estimate_fisher(
        *nnx.split(own.model),
        own.rows,
        len(own.rows),
        make_mesh("fsdp=1"),
        seed=config.seed,
        factored=factored,
    )


def texts_at(temperature: float) -> MakeOptimizer:
    """The Fisher information on texts that were drawn at that temperature."""

    def make(config: Config) -> optax.GradientTransformation:
        own = own_texts(config, temperature=temperature)
        return keep_in(scale_by_fisher(_fisher(own, config, factored=True)), config)

    return make


class RefreshedState(NamedTuple):
    """State of `refreshed`."""

    step: jax.Array  # int32 []
    fisher: Any  # dense, float32
    scale: Any  # of `scale_by_fisher`


def refreshed(config: Config) -> optax.GradientTransformation:
    """Dense Fisher information, made anew after half of the steps.

    From then on it is that of the model as it is by then, still on texts that the
    pretrained model wrote.
    """
    model, rows = own_texts(config)
    graph, pretrained = nnx.split(model)
    gradient = probe_gradient(graph)
    texts = jax.tree.map(lambda *x: np.stack(x), *ordered_batches(rows, 1))
    keys = jax.random.split(jax.random.key(config.seed), len(rows))
    scale = scale_by_fisher()
    assert config.steps is not None, "the runs compared are counted in steps"
    half = config.steps // 2

    def fisher_of(params: Any) -> Any:
        def squares(text_and_key: tuple[dict[str, jax.Array], jax.Array]) -> Any:
            return jax.tree.map(jnp.square, gradient(params, *text_and_key))

        found = jax.lax.map(squares, (texts, keys))
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), found)

    with jax.numpy_dtype_promotion("standard"):  # as in compile_step
        start = jax.jit(fisher_of)(pretrained)

    def init(params: Any) -> RefreshedState:
        return RefreshedState(jnp.int32(0), start, scale.init(params))

    def update(
        updates: Any, state: RefreshedState, params: Any = None, **extra: Any
    ) -> tuple[Any, RefreshedState]:
        fisher = jax.lax.cond(
            state.step == half, fisher_of, lambda _: state.fisher, params
        )
        updates, scaled = scale.update(
            updates, state.scale, params, **extra | {"fisher": fisher}
        )
        return updates, RefreshedState(state.step + 1, fisher, scaled)

    return keep_in(optax.GradientTransformationExtraArgs(init, update), config)


class _Axes(NamedTuple):
    """Eigenvectors of a matrix's two factors, and the products of their eigenvalues."""

    left: jax.Array  # [n, n]
    right: jax.Array  # [m, m]
    values: jax.Array  # [n, m]


def kronecker(config: Config) -> optax.GradientTransformation:
    """Whole matrices for rows and columns in place of their diagonals.

    The Fisher information of a matrix [n, m] is taken to be the Kronecker product of
    E[G G'] and E[G' G] over the trace, of the gradients G of each text (Shampoo's
    factors, arXiv 1802.09568). Their diagonals are those of `FactoredFisher`.
    """
    model, rows = own_texts(config)
    graph, params = nnx.split(model)
    gradient = row_gradient(graph, make_mesh("fsdp=1"), config.seed)
    found = None
    for row in ordered_batches(rows, 1):
        factors = jax.tree.map(_factors, gradient(params, row))
        found = factors if found is None else optax.tree.add(found, factors)
    found = optax.tree.scale(1 / len(rows), found)
    is_factors = lambda x: isinstance(x, tuple)
    totals = [
        jnp.trace(leaf[0]) if is_factors(leaf) else jnp.sum(leaf)
        for leaf in jax.tree.leaves(found, is_leaf=is_factors)
    ]
    mean = sum(totals) / sum(x.size for x in jax.tree.leaves(params))

    def axes(leaf: Any) -> Any:
        if not is_factors(leaf):
            return leaf / mean
        (of_rows, left), (of_columns, right) = map(jnp.linalg.eigh, leaf)
        values = jnp.outer(jnp.maximum(of_rows, 0), jnp.maximum(of_columns, 0))
        return _Axes(left, right, values / (jnp.trace(leaf[0]) * mean))

    held = jax.tree.map(axes, found, is_leaf=is_factors)

    def divide(update: jax.Array, leaf: Any) -> jax.Array:
        if not isinstance(leaf, _Axes):
            return update / (leaf + DAMPING)
        turned = leaf.left.T @ update @ leaf.right / (leaf.values + DAMPING)
        return leaf.left @ turned @ leaf.right.T

    metric = optax.stateless(lambda updates, _: jax.tree.map(divide, updates, held))
    return keep_in(optax.chain(metric, at_unit_scale()), config)


def _factors(gradient: jax.Array) -> Any:
    if gradient.ndim < 2:
        return jnp.square(gradient)
    return gradient @ gradient.T, gradient.T @ gradient


def scored(
    make_score: Callable[[Config], Callable[[Any, Any, Any, Any], Any]],
) -> MakeOptimizer:
    """The filter by another score, which `filter_by_momentum` takes."""

    def make(config: Config) -> optax.GradientTransformation:
        inner = optax.chain(
            optax.scale_by_adam(0.9, 0.999, 1e-8),
            in_metric(),
            scale_by_given_learning_rate(),
        )
        return filter_by_momentum(
            inner,
            config.alpha,
            score=make_score(config),
            filter_mask=all_but_norms_and_biases,
        )

    return make


def second_order(config: Config) -> Callable[[Any, Any, Any, Any], Any]:
    """The gain less what the step is predicted to forget, half of F times its square.

    Both are in nats a token: F is that of a text over its tokens.
    """
    own = own_texts(config)
    tokens = float(own.rows.take()["loss_mask"].sum()) / len(own.rows)
    fisher = optax.tree.scale(1 / tokens, _fisher(own, config, factored=False))

    def score(gradients: Any, updates: Any, *_: Any) -> Any:
        def of(g: jax.Array, u: jax.Array, f: jax.Array) -> jax.Array:
            return jnp.maximum(0, -g * u - f * u * u / 2)

        return jax.tree.map(of, gradients, updates, fisher)

    return score


def fatigue(config: Config) -> Callable[[Any, Any, Any, Any], Any]:
    """The gain over 1 + how far the entry has moved, in learning rates."""
    pretrained = nnx.state(load_model(config.model))

    def score(gradients: Any, updates: Any, _: Any, params: Any) -> Any:
        def of(g: jax.Array, u: jax.Array, p: jax.Array, start: jax.Array) -> jax.Array:
            return jnp.maximum(0, -g * u) / (
                1 + jnp.abs(p - start) / config.learning_rate
            )

        return jax.tree.map(of, gradients, updates, params, pretrained)

    return score
