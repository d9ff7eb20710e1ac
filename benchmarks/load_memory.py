"""How much host memory loading a Hugging Face checkpoint takes, beside the model.

Generates a checkpoint of TinyLlama-1.1B's shape in bfloat16, in several files, and
loads it in a fresh process each time, on a CPU, where the model itself lies in host
memory. Peaks are the system's own (VmHWM of /proc, so on Linux), mapped files
included. Writes JSON and prints a table.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.outputs import make_room
from examples import terminal
from examples.checks import check_least, check_name
from examples.environment import environment
from examples.files import write_json
from examples.llama.checkpoints.huggingface import tensor_shapes
from examples.llama.checkpoints.huggingface_config import to_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.checkpoints.safetensors_files import write_tensors
from examples.llama.model.architectures import ARCHITECTURES, LlamaConfig
from examples.llama.model.parameters import named_parameters
from examples.llama.model.sharding import make_mesh, parameter_sharding

# Dtype of the parameters, and the mesh of simulated devices that they are split over.
RUNS = (("bfloat16", ""), ("float32", ""), ("bfloat16", "fsdp=4,tensor=2"))
ALLOWED = 1.2
TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write."""
    architecture: str = "tinyllama-1.1b"
    """The model's shape, by name."""
    file_bytes: int = 500_000_000
    """Bytes of tensors in each file of the checkpoint."""
    tiny: bool = False
    """A small shape: to see that it runs."""


def generate_checkpoint(path: Path, config: LlamaConfig, file_bytes: int) -> None:
    """Writes a model of random weights, with one tensor at a time in memory."""
    (path / "config.json").write_text(json.dumps(to_hugging_face(config)))
    shapes = tensor_shapes(config)

    def tensors() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for shape in tqdm(shapes.values(), unit="tensor", **terminal.bar_style()):
            yield (rng.random(shape, np.float32) - 0.5).astype(jnp.bfloat16)

    write_tensors(path, shapes, np.dtype(jnp.bfloat16), tensors(), file_bytes)


def memory(field: str) -> int:
    """Bytes of this process: VmRSS is what is resident now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}")


def load(path: Path, param_dtype: str, mesh: str) -> dict[str, Any]:
    """Loads the checkpoint, in a process that did nothing before, and measures that."""
    sharding = parameter_sharding(make_mesh(mesh)) if mesh else None
    jnp.ones((8, 8)).sum().block_until_ready()
    baseline = memory("VmRSS")
    started = time.perf_counter()
    model = load_model(path, param_dtype=param_dtype, sharding=sharding)
    seconds = time.perf_counter() - started
    peak = memory("VmHWM") - baseline
    size = sum(x.nbytes for x in named_parameters(model).values())
    return {
        "param_dtype": param_dtype,
        "mesh": mesh,
        "model_bytes": size,
        "baseline_bytes": baseline,
        "peak_bytes_over_baseline": peak,
        "ratio": peak / size,
        "seconds": round(seconds, 1),
    }


def measure(args: Args) -> dict[str, Any]:
    """All RUNS on one generated checkpoint, written to `args.output`."""
    check_name("architecture", args.architecture, ARCHITECTURES)
    check_least("file_bytes", args.file_bytes, 1)
    config = ARCHITECTURES[args.architecture]
    if args.tiny:
        config = dataclasses.replace(config, head_dim=None, **TINY)
    results: dict[str, Any] = {"architecture": args.architecture, "tiny": args.tiny}
    results |= environment()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        generate_checkpoint(path, config, args.file_bytes)
        files = sorted(path.glob("*.safetensors"))
        results["files"] = len(files)
        results["checkpoint_bytes"] = sum(file.stat().st_size for file in files)
        results["runs"] = []
        for param_dtype, mesh in RUNS:
            devices = math.prod(int(x.split("=")[1]) for x in mesh.split(",") if x)
            flags = f"--xla_force_host_platform_device_count={devices}"
            process = subprocess.run(
                [sys.executable, __file__, "--load", path, param_dtype, mesh],
                env=os.environ
                | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
                | {"PYTHONPATH": str(Path(__file__).parents[1])},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results["runs"].append(json.loads(process.stdout.splitlines()[-1]))
    write_json(args.output, results)
    return results


def report(results: dict[str, Any]) -> str:
    """The runs as a table of Markdown."""
    rows = [
        "| parameters | devices | model (MB) | peak over baseline (MB) | ratio "
        "| seconds |",
        "|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        size, peak = run["model_bytes"] / 1e6, run["peak_bytes_over_baseline"] / 1e6
        rows.append(
            f"| {run['param_dtype']} | {run['mesh'] or 'one'} | {size:,.0f} "
            f"| {peak:,.0f} | {run['ratio']:.3f} | {run['seconds']} |"
        )
    worst = max(run["ratio"] for run in results["runs"])
    verdict = "met" if worst <= ALLOWED else "NOT met"
    return "\n".join([*rows, "", f"At most {ALLOWED} times the model: {verdict}."])


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the results and prints the table."""
    program = "python -m benchmarks.load_memory"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("load_memory"):
        make_room(args.output)
        print(report(measure(args)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        path, param_dtype, mesh = sys.argv[2:]
        print(json.dumps(load(Path(path), param_dtype, mesh)))
    else:
        main()
