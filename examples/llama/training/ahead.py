"""The training step, compiled from shapes alone, for chips that nobody here has.

A part of examples.llama.plan, which starts it with the environment that a compiler
needs and says on standard input what to compile. Prints a line of JSON.
"""

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from examples.chips import CHIPS, devices
from examples.llama.checkpoints.huggingface_config import from_hugging_face
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama
from examples.llama.model.lora import add_lora
from examples.llama.model.loss import chunk_count
from examples.llama.model.parameters import named_parameters
from examples.llama.model.sharding import (
    check_rows,
    make_mesh,
    parameter_sharding,
    partition,
    replicated,
    state_shardings,
)
from examples.llama.training.config import Config
from examples.llama.training.optimizers import make_optimizer
from examples.llama.training.steps import (
    Fixed,
    TrainState,
    compile_step,
    make_step,
    peak_bytes,
)
from examples.programs import describe
from mofo_jax.continual import fisher_diagonal

# Of the search for thresholds in a real run; see docs/results/accelerators_tpu.md.
PASSES = 6


class Ahead(NamedTuple):
    """A compiled step, and the shapes of what it works on."""

    compiled: Any
    state: TrainState
    fixed: Fixed


def compile_ahead(config: Config, shape: LlamaConfig, mesh: Mesh) -> Ahead:
    """The step of a run with a model of this shape.

    Args:
      config: The run's settings. Of what works against forgetting it may have the
        metric of `keep`.
      shape: Of the model.
      mesh: Its devices may come from `examples.chips.devices`, or be real.

    Raises:
      ValueError: The batch does not divide among the devices, or a rank of LoRA is too
        large.
      jax.errors.JaxRuntimeError: It does not fit into the devices' memory.
    """
    check_rows(config.batch_size // config.accumulate, mesh, config.mesh)

    def new() -> Llama:
        options = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        model = Llama(shape, rngs=nnx.Rngs(0), remat=config.remat, **options)
        if config.lora_rank:
            add_lora(
                model,
                config.lora_rank,
                config.lora_alpha,
                rngs=nnx.Rngs(0),
                targets=config.lora_modules,
            )
        return model

    kind = nnx.LoRAParam if config.lora_rank else nnx.Param
    graph, params, *others = nnx.split(nnx.eval_shape(new), kind, ...)
    params, frozen = _placed(params, mesh), _placed(others[0], mesh)
    optimizer = make_optimizer(config)
    with jax.numpy_dtype_promotion("standard"):  # as in `init_state`
        moments = jax.eval_shape(optimizer.init, params)
        moments = jax.tree.map(_at, moments, state_shardings(optimizer, params, mesh))
    count = _at(jax.ShapeDtypeStruct((), jnp.int32), replicated(mesh))
    importance = None
    if config.importance_source is not None:
        estimate = functools.partial(fisher_diagonal, factored=True)
        shapes = jax.eval_shape(lambda p: estimate(lambda p, _: p, p, [None]), params)
        importance = jax.tree.map(lambda x: _at(x, replicated(mesh)), shapes)
    state = TrainState(params, moments, count)
    fixed = Fixed(frozen, importance=importance)
    step = make_step(graph, optimizer, packed=config.pack)
    compiled = compile_step(step, state, fixed, _batch(config, mesh), [], mesh=mesh)
    return Ahead(compiled, state, fixed)


def _at(x: Any, sharding: Any) -> Any:
    """The shape of an array, and where it lies."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _placed(params: nnx.State, mesh: Mesh) -> nnx.State:
    """The same shapes, lying where the trainer has parameters of their names."""
    sharding = parameter_sharding(mesh)
    leaves = [
        _at(x, sharding(name, x.shape)) for name, x in named_parameters(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """As `put_batch` would place a batch."""
    rows = config.batch_size // config.accumulate
    size = (config.accumulate, rows, config.max_length)
    place = NamedSharding(mesh, partition(mesh, (None, "batch", None), size))
    dtypes = {"loss_mask": "bool"} | dict.fromkeys(
        ("tokens", "segment_ids", "positions"), "int32"
    )
    return {
        name: jax.ShapeDtypeStruct(size, d, sharding=place)
        for name, d in dtypes.items()
    }


def costs(chips: str, config: Config, shape: LlamaConfig) -> dict[str, Any]:
    """What a step needs on a machine of `examples.chips.CHIPS`.

    Returns:
      "memory", bytes of a chip for the "parameters", all that the "optimizer" keeps,
      the "pretrained" weights by which forgetting is measured, and what the "step"
      needs besides; the "tokens" of a batch; "collective_bytes", which go between
      chips; and "seconds", None for GPUs. Those are what a TPU's compiler expects of
      all but attention, which it does not know; that counts as if it ran at the chip's
      peak. Only "does_not_fit", the compiler's message, where it refuses.
    """
    machine = CHIPS[chips]
    found = devices(machine.platform, machine.topology)[: machine.number]
    mesh = make_mesh(f"fsdp={machine.number}", found)
    try:
        compiled, state, fixed = compile_ahead(config, shape, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"does_not_fit": str(error).splitlines()[0]}
    program = describe(compiled)
    weights = _bytes((state.params, fixed.frozen))
    optimizer = _bytes((state.opt_state, fixed.importance))
    # LoRA leaves the pretrained weights as they are.
    copy = weights if config.reference and not config.lora_rank else 0
    rows = config.batch_size // config.accumulate
    seconds = None
    if machine.clock:
        turns = chunk_count(rows, config.max_length, shape.vocab_size)
        cycles = program["step"]["cycles"] or 0
        cycles += turns * config.accumulate * (program["turn"]["cycles"] or 0)
        cycles += PASSES * (program["pass"]["cycles"] or 0)
        seconds = cycles / machine.clock
        seconds += _attention_flops(config, shape) / machine.number / machine.flops
    return {
        "memory": {
            "parameters": weights,
            "optimizer": optimizer,
            "pretrained": copy,
            "step": peak_bytes(compiled) - weights - optimizer,
        },
        "tokens": config.batch_size * config.max_length,
        "collective_bytes": program["collective_bytes"],
        "seconds": seconds,
    }


def _bytes(tree: Any) -> int:
    """Of each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _attention_flops(config: Config, shape: LlamaConfig) -> float:
    """Of a step: two products forward and five backward, of half of all pairs."""
    products = 7 if config.remat == "none" else 9  # forward once more
    pairs = config.batch_size * config.max_length**2 / 2
    width = shape.num_attention_heads * shape.head_size
    return 2.0 * products * pairs * width * shape.num_hidden_layers


def main() -> None:
    """Reads what to compile, and prints what it costs."""
    given = json.load(sys.stdin)
    needed: dict[str, Any] = {"model": Path(), "data": (), "output": Path()}
    config = Config(**needed, learning_rate=1e-5, steps=9, **given["config"])
    shape = from_hugging_face(given["shape"])
    print(json.dumps(costs(given["chips"], config, shape)))


if __name__ == "__main__":
    main()
