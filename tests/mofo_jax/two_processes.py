"""One of two processes of a test: python two_processes.py RANK PORT OUTPUT.

Selects in a leaf that is sharded over both, and writes what it holds of the mask and
what the compiled program moves.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.programs import collectives
from mofo_jax import mofo, top_fraction_mask


def leaf() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    return np.round(x, 1)  # many ties


def main(rank: int, port: int, output: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    sharding = NamedSharding(mesh, P("fsdp"))
    x = jax.make_array_from_callback((64, 96), sharding, lambda i: leaf()[i])

    select = jax.jit(lambda x: top_fraction_mask(x, 0.13))
    text = select.lower(x).compile().as_text()
    mask = select(x)

    optimizer = mofo(0.1, alpha=0.13)
    params = jax.jit(jnp.zeros_like)(x)
    state = jax.jit(optimizer.init)(params)
    updates, _ = jax.jit(optimizer.update)(x, state, params)
    params = jax.jit(optax.apply_updates)(params, updates)

    local = lambda a: np.concatenate([s.data for s in a.addressable_shards])
    np.savez(f"{output}/{rank}.npz", mask=local(mask), moved=local(params) != 0)
    with open(f"{output}/{rank}.json", "w") as file:
        json.dump(collectives(text), file)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
