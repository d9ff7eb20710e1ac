"""What MoFO moves between 8 devices in a step; a part of benchmarks.cost.

Run with XLA_FLAGS=--xla_force_host_platform_device_count=8, and --tiny for small
shapes. Prints a line of JSON.
"""

import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.trees import llama
from benchmarks.turns import GRADIENTS, step_of
from examples.programs import collectives
from mofo_jax import mofo
from mofo_jax.testing import count_passes

TINY = "--tiny" in sys.argv
SHAPES = llama(1, 64, 128, 256) if TINY else llama(4, 256, 704, 2048)
# For each layout the mesh, and the axes that split a matrix's rows and columns.
LAYOUTS = {
    "FSDP": ((8, 1), P("fsdp", None)),
    "tensor parallel": ((1, 8), P(None, "tensor")),
    "both": ((4, 2), P("fsdp", "tensor")),
}


def spec(name: str, shape: tuple[int, ...], matrices: P) -> P:
    """Down and output projections are split the other way, as is usual."""
    if len(shape) == 1:
        return P()
    transposed = "down" in name or "o_proj" in name or name == "embed"
    return P(*reversed(matrices)) if transposed else matrices


def measure(layout: str) -> dict[str, Any]:
    """Collectives of one step: those compiled, and those that a step ran."""
    sizes, matrices = LAYOUTS[layout]
    mesh = jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shardings = {
        n: NamedSharding(mesh, spec(n, s, matrices)) for n, s in SHAPES.items()
    }
    optimizer = mofo(1e-3)
    zeros = {n: jax.device_put(jnp.zeros(s), shardings[n]) for n, s in SHAPES.items()}
    state = jax.tree.map(
        lambda x: x if x.ndim > 1 else jax.device_put(x, NamedSharding(mesh, P())),
        optimizer.init(zeros),
    )
    step = step_of(optimizer)
    compiled = step.lower(zeros, state, zeros).compile()
    moved = collectives(compiled.as_text())
    inside = sum("while/body" in c.line for c in moved)
    outside = len(moved) - inside
    largest = max((math.prod(s) for c in moved for _, s in c.arrays), default=0)
    passes = _passes(zeros, state, shardings)
    return {
        "largest": largest,
        "outside": outside,
        "a_pass": inside,
        "passes": passes,
        "a_step": outside + inside * passes,
    }


def _passes(params: Any, state: Any, shardings: Any) -> int:
    """Passes of the search in a typical step: of one after some warm-up."""
    with count_passes() as passes:
        step = step_of(mofo(1e-3))
        for i in range(12):
            keys = jax.random.split(jax.random.key(i), len(SHAPES))
            gradients = {
                n: jax.device_put(
                    GRADIENTS["ordinary"](
                        jnp.int32(i),
                        jax.random.normal(jax.random.key(99), s),
                        jax.random.normal(k, s),
                    ),
                    shardings[n],
                )
                for (n, s), k in zip(SHAPES.items(), keys, strict=True)
            }
            params, state = step(params, state, gradients)
            taken = passes()
    return taken


if __name__ == "__main__":
    print(json.dumps({layout: measure(layout) for layout in LAYOUTS}))
