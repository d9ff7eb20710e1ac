"""The training step: losses, gradients and the update, on any mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from examples.llama.loss import Batch, next_token_loss
from examples.llama.optimizers import Schedule
from examples.llama.sharding import replicated, shardings_of, state_shardings


class TrainState(NamedTuple):
    """All that changes while a model trains."""

    params: nnx.State  # those that are trained
    opt_state: Any
    step: jax.Array  # int32 [], steps done
    key: jax.Array  # uint32 data of a random key, for methods that draw


def init_state(
    optimizer: optax.GradientTransformation, params: nnx.State, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step, each moment lying where its parameter does."""
    # Optax mixes dtypes (decay**count), which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        shardings = state_shardings(optimizer, params, mesh)
        opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    step, key = jnp.int32(0), jax.random.key_data(jax.random.key(seed))
    return TrainState(params, opt_state, *jax.device_put((step, key), replicated(mesh)))


def make_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    packed: bool,
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A function of the state, the frozen parameters and a batch; jit and donate it.

    A batch's arrays are [parts, rows, L]. The parts are computed one after another, and
    every counted token weighs the same whatever its part, so that the gradient is that
    of the whole batch. Metrics: "loss" (nats per counted token), "gradient_norm" (not
    clipped), "learning_rate", and "tokens", the real ones, counted or not.
    """

    def loss_sum(params: nnx.State, frozen: nnx.State, part: Batch) -> Any:
        model = nnx.merge(graph, params, frozen)
        return next_token_loss(model, part, packed=packed)

    def train_step(state: TrainState, frozen: nnx.State, batch: Batch) -> Any:
        params = state.params
        differentiate = jax.value_and_grad(loss_sum, has_aux=True)

        def add(carry: Any, part: Batch) -> Any:
            found = differentiate(params, frozen, part)
            return optax.tree.add(carry, found), None

        if batch["tokens"].shape[0] == 1:
            sums = differentiate(params, frozen, jax.tree.map(lambda x: x[0], batch))
        else:
            # In float32, whatever the gradients' precision.
            start = jnp.float32(0), jnp.float32(0)
            zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
            sums, _ = jax.lax.scan(add, (start, zeros), batch)
        (loss, count), gradients = sums
        count = jnp.maximum(count, 1)
        gradients = jax.tree.map(
            lambda g, p: (g / count.astype(g.dtype)).astype(p.dtype),
            gradients,
            params,
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        metrics = {
            "loss": loss / count,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
        }
        params = optax.apply_updates(params, updates)
        # In the order of the donated inputs: each reuses its predecessor's buffer.
        return TrainState(params, opt_state, state.step + 1, state.key), metrics

    return train_step


def compile_step(
    train_step: Any, state: TrainState, frozen: nnx.State, batch: Batch, mesh: Mesh
) -> Any:
    """The step compiled for these shapes, its state staying where it lies."""
    everywhere = replicated(mesh)
    compiled = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings_of(state), everywhere),
    )
    # Promotion: the gradient of jax.nn.dot_product_attention, and Optax.
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        return compiled.lower(state, frozen, batch).compile()
