"""Chips for which programs can be compiled without having them.

A TPU's compiler is the package libtpu. A GPU's is that of jax[cuda12], with cuDNN for
the kernels of attention. Both look at their environment when JAX starts.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.experimental import topologies


class Chips(NamedTuple):
    """A machine, or a part of one.

    Attributes:
      platform: "tpu" or "gpu".
      topology: As JAX names it.
      kind: Of a TPU, the accelerator type of Google Cloud.
      number: How many chips of the topology.
      memory: Bytes of each.
      flops: Of each, dense bfloat16 operations a second.
      clock: Of a TPU, cycles a second.
    """

    platform: str
    topology: str
    kind: str
    number: int
    memory: float
    flops: float
    clock: float = 0.0


# From the makers' data sheets.
_V5E: dict[str, Any] = {"memory": 16e9, "flops": 197e12, "clock": 1.5e9}
_V5P: dict[str, Any] = {"memory": 95e9, "flops": 459e12, "clock": 1.75e9}
_H100: dict[str, Any] = {"memory": 80e9, "flops": 989e12}
# TPUs by the names of Google Cloud, which counts two cores for each chip of a v5p.
CHIPS = {
    "v5e-1": Chips("tpu", "v5e:2x2", "v5litepod-4", 1, **_V5E),
    "v5e-4": Chips("tpu", "v5e:2x2", "v5litepod-4", 4, **_V5E),
    "v5e-8": Chips("tpu", "v5e:2x4", "v5litepod-8", 8, **_V5E),
    "v5e-64": Chips("tpu", "v5e:8x8", "v5litepod-64", 64, **_V5E),
    "v5p-8": Chips("tpu", "v5p:2x2x1", "v5p-8", 4, **_V5P),
    "v5p-64": Chips("tpu", "v5p:4x4x2", "v5p-64", 32, **_V5P),
    "v5p-128": Chips("tpu", "v5p:4x4x4", "v5p-128", 64, **_V5P),
    "h100": Chips("gpu", "1x1x1", "", 1, **_H100),
    "h100-8": Chips("gpu", "1x1x8", "", 8, **_H100),
}

# XLA's GpuTargetConfigProto of an H100.
TARGET = """
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


def devices(platform: str, topology: str) -> Any:
    """The chips of a topology, for JAX to compile for. No such chip is needed."""
    if platform == "tpu":
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    else:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology,
            topology=topology,
            target_config=TARGET,
        )
    return found.devices


def ask(
    python: Path, command: Sequence[str], platform: str, kind: str, given: str = ""
) -> dict[str, Any]:
    """What a module prints in a process whose JAX knows the chips from its start.

    Args:
      python: A Python that has the compiler.
      command: The module and its arguments. Its last line is a JSON object.
      platform: See `Chips`, also for `kind`.
      kind: Of the chips.
      given: For its standard input.

    Raises:
      ValueError: It fails; the message is the last line of what it says.
    """
    done = subprocess.run(
        [python, "-m", *command],
        input=given,
        env=os.environ | _environment(platform, kind),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError((done.stderr.strip() or "it says nothing").splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _environment(platform: str, kind: str) -> dict[str, str]:
    found = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if platform == "tpu":
        found |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        found |= {"TPU_ACCELERATOR_TYPE": kind}
        # Without a chip there is nothing that two processes could not share.
        found |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return found
