"""An optimizer's step, compiled for chips that are not there.

A part of benchmarks.accelerators, which starts it with the environment that a compiler
needs. Prints the costs of the compiled program as a line of JSON.
"""

import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.inspection import collectives, dtype_bytes
from benchmarks.trees import TREES
from mofo_jax import mofo
from mofo_jax.continual import FactoredFisher, scale_by_fisher

# XLA's GpuTargetConfigProto of an H100.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
Costs = Counter[str]  # cycles, kernels and bytes
# Operations that are no work of their own.
_FREE = re.compile(
    r"(parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call"
    r"|after-all|partition-id|replica-id|opt-barrier|\S+-done|\S+-update)$"
)
_CALLED = re.compile(
    r"(?:body|to_apply|(?:true|false)_computation|branch_computations)=\{?"
    r"(%?[\w.-]+)"
)
_DEFINED = re.compile(r"\s*(?:ROOT )?(%?[\w.-]+) = (.*?) ([\w-]+)\((.*)$")


def devices(platform: str, topology: str) -> Any:
    """The chips of a topology, which need not be there."""
    if platform == "tpu":
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology
        )
    else:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology,
            topology=topology,
            target_config=H100,
        )
    return description.devices


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
        extra["fisher"] = jax.tree.map(put, {n: _factors(params[n]) for n in params})
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


def _factors(x: jax.ShapeDtypeStruct) -> Any:
    if len(x.shape) < 2:
        return jax.ShapeDtypeStruct(x.shape, jnp.float32)
    rows, columns = x.shape
    zeros = lambda: FactoredFisher(jnp.zeros(rows), jnp.zeros(columns))
    return jax.eval_shape(zeros)


def describe(compiled: Any) -> dict[str, Any]:
    """What a step costs: in all, but for the search's loop, and each pass of it.

    Cycles are the estimate of the TPU's compiler, and None of another. Kernels are
    operations that run by themselves. Bytes are those of their operands and results.
    """
    text = compiled.as_text()
    computations = dict(_computations(text))
    (entry,) = (name for name in computations if name.startswith("ENTRY"))
    once: Costs = Counter()
    per_pass: Costs = Counter()
    _add(computations, entry, once, per_pass)
    moved = collectives(text)
    return {
        "step": _as_json(once),
        "pass": _as_json(per_pass),
        "collectives": len(moved),
        "collective_bytes": sum(
            dtype_bytes(dtype) * math.prod(shape)
            for found in moved
            for dtype, shape in found.arrays
        ),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def _as_json(costs: Costs) -> dict[str, int | None]:
    return {
        "cycles": costs["cycles"] or None,
        "kernels": costs["kernels"],
        "bytes": costs["bytes"],
    }


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """The names of a program's computations, and their lines."""
    name = ""
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and "->" in line:
            name, lines = line.split(" (")[0].split("(")[0].strip(), []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _add(
    computations: dict[str, list[str]], name: str, once: Costs, per_pass: Costs
) -> None:
    """Adds what a computation does, loops of known length as often as they run."""
    sizes: dict[str, int] = {}
    for line in computations[name]:
        if not (match := _DEFINED.match(line)):
            continue
        defined, kind, operation, rest = match.groups()
        sizes[defined] = sum(_arrays(kind))
        if operation in ("while", "call", "conditional"):
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            searching = operation == "while" and trips is None
            target = per_pass if searching else once
            for called in _CALLED.findall(line):
                inside: Costs = Counter()
                _add(computations, called, inside, per_pass)
                for unit, cost in inside.items():
                    target[unit] += cost * (int(trips[1]) if trips else 1)
        elif not _FREE.match(operation):
            once["kernels"] += 1
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            once["cycles"] += int(cycles[1]) if cycles else 0
            if operation.endswith("-start"):  # its result has its operand in it
                once["bytes"] += min(filter(None, _arrays(kind)), default=0)
            else:
                operands = re.findall(r"%[\w.-]+", rest.split("), ")[0])
                once["bytes"] += sizes[defined] + sum(sizes.get(x, 0) for x in operands)


def _arrays(kind: str) -> list[int]:
    """The bytes of each array of a type, such as (f32[2,3]{1,0}, s32[]).

    Those that a TPU holds in its fast memory, space 1, count as none.
    """
    return [
        0
        if "S(1)" in layout
        else dtype_bytes(dtype) * math.prod(map(int, filter(None, shape.split(","))))
        for dtype, shape, layout in re.findall(
            r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", kind
        )
    ]


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
