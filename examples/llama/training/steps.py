"""The training step: losses, gradients and the update, on any mesh."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from examples.llama.model.loss import Batch, next_token_loss
from examples.llama.model.sharding import replicated, shardings_of, state_shardings
from examples.llama.training.optimizers import Schedule


class TrainState(NamedTuple):
    """All that changes while a model trains."""

    params: nnx.State  # those that are trained
    opt_state: Any
    step: jax.Array  # int32 [], steps done


class Fixed(NamedTuple):
    """What a step reads and does not change."""

    frozen: nnx.State  # parameters that do not train
    pretrained: nnx.State | None = None  # all parameters, as they were
    fisher: Any = None  # their Fisher information, for EWC
    importance: Any = None  # that of the trained ones, which divides steps


def init_state(
    optimizer: optax.GradientTransformation, params: nnx.State, mesh: Mesh
) -> TrainState:
    """The state before the first step, each moment lying where its parameter does."""
    # Optax mixes dtypes (decay**count), which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        shardings = state_shardings(optimizer, params, mesh)
        opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    step = jax.device_put(jnp.int32(0), replicated(mesh))
    return TrainState(params, opt_state, step)


def make_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    packed: bool,
    reference: nnx.GraphDef | None = None,
    project: Callable[[Any, Sequence[Any]], Any] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A function of the state, `Fixed` and a batch; jit it and donate the state.

    A batch's arrays are [parts, rows, L]. The parts are computed one after another, and
    every counted token weighs the same whatever its part, so that the gradient is that
    of the whole batch. With `reference`, the graph of the pretrained model, a batch has
    a "kl_weight" for each token, see `next_token_loss`. With `project` the function
    takes a sequence of other batches as well, and the gradient is
    `project(gradient, theirs)`.

    Metrics: "loss" (nats per counted token), "gradient_norm" (not clipped),
    "learning_rate", and "tokens", the real ones, counted or not.
    """

    def loss_sum(params: nnx.State, fixed: Fixed, part: Batch) -> Any:
        # A copy: under nnx.remat the frozen variables may not be those of outside.
        model = nnx.merge(graph, params, fixed.frozen, copy=True)
        pretrained = None
        if reference is not None and "kl_weight" in part:
            pretrained = nnx.merge(reference, fixed.pretrained)
        return next_token_loss(model, part, packed=packed, pretrained=pretrained)

    differentiate = jax.value_and_grad(loss_sum, has_aux=True)

    def mean_gradient(params: nnx.State, fixed: Fixed, batch: Batch) -> Any:
        """The loss per counted token, and its gradient."""

        def add(carry: Any, part: Batch) -> Any:
            found = differentiate(params, fixed, part)
            return optax.tree.add(carry, found), None

        if batch["tokens"].shape[0] == 1:
            sums = differentiate(params, fixed, jax.tree.map(lambda x: x[0], batch))
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
        return loss / count, gradients

    def train_step(
        state: TrainState, fixed: Fixed, batch: Batch, others: Sequence[Batch] = ()
    ) -> Any:
        params = state.params
        loss, gradients = mean_gradient(params, fixed, batch)
        if project is not None:
            theirs = [mean_gradient(params, fixed, other)[1] for other in others]
            gradients = project(gradients, theirs)
        extra = {
            "reference": fixed.pretrained,
            "fisher": fixed.fisher,
            "importance": fixed.importance,
        }
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            gradients, state.opt_state, params, **extra
        )
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
        }
        params = optax.apply_updates(params, updates)
        # In the order of the donated inputs: each reuses its predecessor's buffer.
        return TrainState(params, opt_state, state.step + 1), metrics

    return train_step


def compile_step(
    train_step: Any, state: TrainState, fixed: Fixed, *batches: Any, mesh: Mesh
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
        return compiled.lower(state, fixed, *batches).compile()
