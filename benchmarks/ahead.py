"""An optimizer's step, compiled for chips that are not there.

A part of benchmarks.accelerators, which starts it with the environment that a compiler
needs. Prints the costs of the compiled program as a line of JSON.
"""

import functools
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.trees import TREES
from examples.chips import devices
from examples.programs import describe
from mofo_jax import mofo
from mofo_jax.continual import fisher_diagonal, scale_by_fisher


def compile_step(method: str, tree: str, mesh: Mesh) -> Any:
    """The compiled step of an optimizer, with its parameters split over all chips."""
    shapes = TREES[tree]
    chips = mesh.devices.size

    def put(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        splits = x.ndim > 1 and x.shape[0] % chips == 0
        sharding = NamedSharding(mesh, P("fsdp") if splits else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = {n: put(jax.ShapeDtypeStruct(s, jnp.float32)) for n, s in shapes.items()}
    extra: dict[str, Any] = {}
    if method == "keep":
        extra["fisher"] = jax.tree.map(put, factors(params))
    elif method == "keep, F whole":
        extra["fisher"] = params
    optimizer = optax.with_extra_args_support(optimizer_of(method))
    state = jax.tree.map(put, jax.eval_shape(optimizer.init, params))

    def step(params: Any, state: Any, gradients: Any, extra: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):  # it says what the program is for
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
            params, state, params, extra
        )
    return lowered.compile()


def optimizer_of(method: str) -> optax.GradientTransformation:
    """The optimizer by its name in `benchmarks.accelerators`."""
    if method == "adamw":
        return optax.adamw(1e-3, weight_decay=1e-4)
    options: dict[str, Any] = {} if method == "mofo" else {"score": "gain"}
    if method.startswith("keep"):
        options["precondition"] = scale_by_fisher()
    return mofo(1e-3, weight_decay=1e-4, **options)


def factors(params: Any) -> Any:
    """The shapes of the factored Fisher information of parameters."""
    estimate = functools.partial(fisher_diagonal, factored=True)
    return jax.eval_shape(lambda p: estimate(lambda p, _: p, p, [None]), params)


def main(platform: str, topology: str, chips: int, tree: str, method: str) -> None:
    """Compiles, and prints what it found."""
    found = np.array(devices(platform, topology)[:chips])
    begun = time.perf_counter()
    try:
        compiled = compile_step(method, tree, Mesh(found, ("fsdp",)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(json.dumps({"does_not_fit": str(error).splitlines()[0]}))
        return
    seconds = time.perf_counter() - begun
    print(json.dumps(describe(compiled) | {"seconds": round(seconds, 1)}))


if __name__ == "__main__":
    platform, topology, chips, tree, method = sys.argv[1:]
    main(platform, topology, int(chips), tree, method)
