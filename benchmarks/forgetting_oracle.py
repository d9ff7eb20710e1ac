"""How much a metric could keep: steps in that of the whole Fisher matrix.

A diagonal, or factors of it, leave out which entries make up for each other. The whole
matrix has too many entries, but its product with a vector takes two passes over the
texts, and conjugate gradients need no more. That is an oracle for the frontier, not a
method: a step takes many times as long.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.forgetting_losses import predictions
from benchmarks.forgetting_metrics import DAMPING, own_texts
from benchmarks.forgetting_optimizers import at_unit_scale
from examples.llama.text.batches import ordered_batches
from examples.llama.training.config import Config
from examples.llama.training.optimizers import scale_by_given_learning_rate

TEXTS, LENGTH = 8, 128  # that the pretrained model writes
ITERATIONS = 10  # of conjugate gradients, in each step
PROBES = 8  # random vectors that the mean of the diagonal is estimated with


def oracle(config: Config) -> optax.GradientTransformation:
    """Momentum over the Fisher matrix of the pretrained model's own texts.

    Solves (F + damping * mean diag F) step = momentum, as far as the iterations go.
    """
    model, rows = own_texts(config, TEXTS, LENGTH)
    batch = next(ordered_batches(rows, TEXTS))
    graph, pretrained = nnx.split(model)

    def product(vector: Any) -> Any:
        return fisher_product(graph, pretrained, batch, vector)

    with jax.numpy_dtype_promotion("standard"):  # as in compile_step
        damping = DAMPING * _mean_diagonal(jax.jit(product), pretrained)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        solved, _ = jax.scipy.sparse.linalg.cg(
            lambda x: optax.tree.add_scale(product(x), damping, x),
            updates,
            maxiter=ITERATIONS,
        )
        return solved, state

    return optax.chain(
        optax.ema(0.9),
        optax.GradientTransformation(optax.init_empty_state, update),
        at_unit_scale(),
        scale_by_given_learning_rate(),
    )


def fisher_product(
    graph: nnx.GraphDef, params: Any, batch: dict[str, Any], vector: Any
) -> Any:
    """The Fisher matrix of a batch's predictions, by token, times a vector.

    The matrix is the mean over counted tokens of J' (diag(p) - p p') J, where J is the
    derivative of the logits by the parameters, and p are the probabilities.

    Args:
      graph: Of the model.
      params: Its parameters.
      batch: Texts, as those that training takes.
      vector: A tree like the parameters, and so is the product.
    """

    def logits(params: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        # As packed rows, whose attention has forward derivatives too.
        found, _, mask = predictions(model, batch, packed=True)
        return found, mask

    found, tangent, mask = jax.jvp(logits, (params,), (vector,), has_aux=True)
    p = jax.nn.softmax(found)
    changed = p * (tangent - jnp.sum(p * tangent, axis=-1, keepdims=True))
    changed *= mask[..., None] / jnp.sum(mask, dtype=jnp.float32)
    _, pull, _ = jax.vjp(logits, params, has_aux=True)
    (result,) = pull(changed)
    return result


def _mean_diagonal(product: Any, like: Any) -> jax.Array:
    """By Hutchinson's estimate, with signs."""
    size = sum(x.size for x in jax.tree.leaves(like))

    def one(key: jax.Array) -> jax.Array:
        signs = optax.tree.random_like(key, like, sampler=jax.random.rademacher)
        return optax.tree.vdot(signs, product(signs)) / size

    keys = jax.random.split(jax.random.key(0), PROBES)
    return jnp.mean(jnp.stack([one(key) for key in keys]))
