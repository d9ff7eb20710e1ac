"""The training step: losses, gradients and the update, on any mesh."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from examples.llama.model.lora import start_dropout
from examples.llama.model.loss import Batch, next_token_loss
from examples.llama.model.sharding import replicated, shardings_of, state_shardings

# As `next_token_loss`: of a model, a batch and the keywords `packed` and `pretrained`.
Loss = Callable[..., tuple[jax.Array, jax.Array]]


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
    dropout_seed: jax.Array | None = None  # uint32 [], of LoRA's dropout, if any


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
    *,
    packed: bool,
    loss: Loss = next_token_loss,
    reference: nnx.GraphDef | None = None,
    project: Callable[[Any, Sequence[Any]], Any] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A function of the state, `Fixed`, the learning rate and a batch.

    Jit it and donate the state. The optimizer gets the learning rate as the extra
    argument `learning_rate`, the batch's loss as `value`, as Optax names it, and for
    penalties the pretrained parameters and their Fisher information.

    A batch's arrays are [parts, rows, L]. The parts are computed one after another, and
    every counted token weighs the same whatever its part, so that the gradient is that
    of the whole batch. With `reference`, the graph of the pretrained model, the loss
    gets that model, and a batch may have a "kl_weight", see `next_token_loss`. With
    `project` the function takes a sequence of other batches as well, and the gradient
    is `project(gradient, theirs)`.

    What LoRA's dropout drops depends on `Fixed.dropout_seed`, the step and the part
    alone, so that a resumed run drops the same.

    Metrics: "loss" (nats per counted token), "gradient_norm" (not clipped),
    "learning_rate", and "tokens", the real ones, counted or not.
    """

    def loss_sum(
        params: nnx.State, fixed: Fixed, part: Batch, key: jax.Array | None
    ) -> Any:
        # A copy: under nnx.remat the frozen variables may not be those of outside.
        model = nnx.merge(graph, params, fixed.frozen, copy=True)
        if key is not None:
            start_dropout(model, key)
        pretrained = None
        if reference is not None:
            pretrained = nnx.merge(reference, fixed.pretrained)
        return loss(model, part, packed=packed, pretrained=pretrained)

    differentiate = jax.value_and_grad(loss_sum, has_aux=True)

    def mean_gradient(
        params: nnx.State, fixed: Fixed, batch: Batch, key: jax.Array | None
    ) -> Any:
        """The loss per counted token, and its gradient."""
        count = batch["tokens"].shape[0]
        parts = batch, None if key is None else jax.random.split(key, count)

        def add(carry: Any, part: tuple[Batch, jax.Array | None]) -> Any:
            found = differentiate(params, fixed, *part)
            return optax.tree.add(carry, found), None

        if count == 1:
            sums = differentiate(params, fixed, *jax.tree.map(lambda x: x[0], parts))
        else:
            # In float32, whatever the gradients' precision.
            start = jnp.float32(0), jnp.float32(0)
            zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
            sums, _ = jax.lax.scan(add, (start, zeros), parts)
        (total, tokens), gradients = sums
        tokens = jnp.maximum(tokens, 1)
        gradients = jax.tree.map(
            lambda g, p: (g / tokens.astype(g.dtype)).astype(p.dtype),
            gradients,
            params,
        )
        return total / tokens, gradients

    def train_step(
        state: TrainState,
        fixed: Fixed,
        learning_rate: jax.Array,
        batch: Batch,
        others: Sequence[Batch] = (),
    ) -> Any:
        params, batches = state.params, [batch, *others]
        keys: Any = [None] * len(batches)
        if fixed.dropout_seed is not None:
            key = jax.random.fold_in(jax.random.key(fixed.dropout_seed), state.step)
            keys = jax.random.split(key, len(batches))
        (value, gradients), *theirs = (
            mean_gradient(params, fixed, part, keys[i])
            for i, part in enumerate(batches)
        )
        if project is not None:
            gradients = project(gradients, [gradient for _, gradient in theirs])
        extra = {
            "learning_rate": learning_rate,
            "value": value,
            "reference": fixed.pretrained,
            "fisher": fixed.fisher,
            "importance": fixed.importance,
        }
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            gradients, state.opt_state, params, **extra
        )
        metrics = {
            "loss": value,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": learning_rate,
            "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
        }
        params = optax.apply_updates(params, updates)
        # In the order of the donated inputs: each reuses its predecessor's buffer.
        return TrainState(params, opt_state, state.step + 1), metrics

    return train_step


def compile_step(
    train_step: Any, state: TrainState, fixed: Fixed, *batches: Any, mesh: Mesh
) -> Any:
    """The step compiled for these shapes, its state staying where it lies.

    The learning rate is a float32 scalar.
    """
    learning_rate = jax.ShapeDtypeStruct((), jnp.float32)
    everywhere = replicated(mesh)
    compiled = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings_of(state), everywhere),
    )
    # Promotion: the gradient of jax.nn.dot_product_attention, and Optax.
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        return compiled.lower(state, fixed, learning_rate, *batches).compile()


def peak_bytes(compiled: Any) -> int:
    """What a compiled program needs at most on each device, inputs included."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held - memory.alias_size_in_bytes + memory.temp_size_in_bytes
