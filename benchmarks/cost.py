"""What MoFO costs beside optax.adamw: time, memory, compilation, communication.

Every number is of the whole jitted step with donated arguments, and the ratio of two
steps that ran in turns in one process. Writes JSON after every section, and a table of
it as Markdown and plots beside it. Started again, it keeps the sections there are.
"""

import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from tqdm import tqdm

from benchmarks import cost_report
from benchmarks.inspection import passes_taken
from examples import terminal
from examples.files import write_json
from examples.llama.train import environment
from mofo_jax import mofo, top_fraction_mask

Shapes = dict[str, tuple[int, ...]]


def llama(layers: int, width: int, hidden: int, vocabulary: int) -> Shapes:
    """The shapes of a Llama's parameters."""
    square, up, down = (width, width), (width, hidden), (hidden, width)
    shapes: Shapes = {"embed": (vocabulary, width), "norm": (width,)}
    shapes["lm_head"] = (width, vocabulary)
    for i in range(layers):
        layer = {name: square for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        layer |= {"gate_proj": up, "up_proj": up, "down_proj": down}
        layer |= {"input_norm": (width,), "post_norm": (width,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


TREES: dict[str, Shapes] = {
    "one 4096x4096 leaf": {"w": (4096, 4096)},
    "Llama of 23M": llama(6, 384, 1024, 16000),
    "Llama of 134M": llama(12, 768, 2048, 32000),
}
LLAMA_2_7B = llama(32, 4096, 11008, 32000)
# Gradients by step, from a fixed direction and fresh noise.
GRADIENTS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "ordinary": lambda step, fixed, noise: fixed + 3 * noise,
    "scale jumps by 1e3": lambda step, fixed, noise: (
        jnp.where(step % 2 == 0, 1.0, 1e3) * (fixed + 3 * noise)
    ),
    "all magnitudes equal": lambda step, fixed, noise: (
        jnp.sign(fixed) * (1 + 0.1 * step.astype(jnp.float32))
    ),
    "99% exact zeros": lambda step, fixed, noise: (
        (fixed + 3 * noise) * (jnp.abs(fixed) > 2.576)
    ),
    "bfloat16 moments": lambda step, fixed, noise: fixed + 3 * noise,
}


# The momentum grows from zero in the first steps, and the thresholds with it.
WARMUP = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write; a table and plots go beside it."""
    repeats: int = 15
    """Measured steps of each optimizer, at least 15 for numbers to be quoted."""
    tiny: bool = False
    """Small shapes: to see that it runs."""


def step_of(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def mask_optimizer(
    mask: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformation:
    """Adam with another way to select."""
    adam = optax.scale_by_adam()

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        updates, state = adam.update(gradients, state, params)
        keep = lambda u, m: jnp.where(mask(m), -1e-3 * u, 0)
        return jax.tree.map(keep, updates, state.mu), state

    return optax.GradientTransformation(adam.init, update)


def by_full_sort(x: jax.Array) -> jax.Array:
    """The mask, ties aside."""
    magnitudes = jnp.abs(x)
    return magnitudes >= jnp.sort(magnitudes.reshape(-1))[-max(1, x.size // 10)]


def time_in_turns(
    optimizers: dict[str, optax.GradientTransformation],
    shapes: Shapes,
    gradients: str,
    repeats: int,
) -> dict[str, list[float]]:
    """Milliseconds of each step, all optimizers on the same gradients in turns."""
    runs, inputs = prepare(optimizers, shapes, gradients, WARMUP + repeats)
    return take_turns(runs, inputs, WARMUP)


def prepare(
    optimizers: dict[str, optax.GradientTransformation],
    shapes: Shapes,
    gradients: str,
    steps: int,
) -> tuple[dict[str, list[Any]], Iterable[Any]]:
    """What :func:`take_turns` takes, and the gradients of so many steps."""
    names = list(shapes)

    def normal(seed: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(seed), len(names))
        draws = zip(names, keys, strict=True)
        return {name: jax.random.normal(key, shapes[name]) for name, key in draws}

    fixed = jax.jit(normal)(0)

    @jax.jit
    def gradient(step: jax.Array) -> Any:
        by_step = functools.partial(GRADIENTS[gradients], step)
        return jax.tree.map(lambda f, n: 1e-3 * by_step(f, n), fixed, normal(step + 1))

    runs = {}
    for name, optimizer in optimizers.items():
        params = jax.tree.map(jnp.zeros_like, fixed)
        runs[name] = [step_of(optimizer), params, jax.jit(optimizer.init)(params)]
    return runs, (gradient(jnp.int32(i)) for i in range(steps))


def take_turns(
    runs: dict[str, list[Any]], inputs: Iterable[Any], warmup: int
) -> dict[str, list[float]]:
    """Milliseconds of the steps of each run: ``[step, params, state]``."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for given in inputs:
        jax.block_until_ready(given)
        for name, run in runs.items():
            step, params, state = run
            start = time.perf_counter()
            run[1:] = jax.block_until_ready(step(params, state, given))
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[warmup:] for name, values in times.items()}


def ratios(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the median of the ratio to adamw's step of the same turn."""
    result: dict[str, Any] = {}
    for name, values in times.items():
        pairs = zip(values, times["adamw"], strict=True)
        ratio = statistics.median(value / base for value, base in pairs)
        result[name] = {"ms": statistics.median(values), "ratio": ratio}
    return result


def steps(args: Args, tree: str, gradients: str) -> dict[str, Any]:
    """Step time on one tree with one kind of gradients."""
    dtype = jnp.bfloat16 if gradients == "bfloat16 moments" else None
    optimizers = {
        "adamw": optax.adamw(1e-3, mu_dtype=dtype),
        "mofo": mofo(1e-3, mu_dtype=dtype, weight_decay=1e-4),
    }
    return ratios(
        time_in_turns(optimizers, _shapes(args, tree), gradients, args.repeats)
    )


def passes(args: Args) -> dict[str, Any]:
    """How many times a step reads the momentum of one leaf to find its threshold."""
    jax.clear_caches()
    counts = []
    with passes_taken() as taken:
        shapes, total = _shapes(args, "one 4096x4096 leaf"), WARMUP + args.repeats
        runs, inputs = prepare({"mofo": mofo(1e-3)}, shapes, "ordinary", total)
        for given in inputs:
            taken.clear()
            take_turns(runs, [given], 0)
            jax.effects_barrier()
            counts.append(len(taken))
    return {"mean": statistics.mean(counts[WARMUP:]), "most": max(counts[WARMUP:])}


def others(args: Args) -> dict[str, Any]:
    """Other ways to the same update, on one leaf."""
    top_k = functools.partial(top_fraction_mask, alpha=0.1, method="top_k")
    optimizers = {
        "adamw": optax.adamw(1e-3),
        "mofo": mofo(1e-3),
        "jax.lax.top_k's mask": mask_optimizer(top_k),
        "a full sort": mask_optimizer(by_full_sort),
        "mofo, scheduled alpha": mofo(1e-3, alpha=optax.linear_schedule(0.2, 0.1, 100)),
        "mofo, injected hyperparameters": optax.inject_hyperparams(mofo)(1e-3),
        "adamw, injected hyperparameters": optax.inject_hyperparams(optax.adamw)(1e-3),
    }
    shapes: Shapes = {"w": (64, 64) if args.tiny else (2048, 2048)}
    result = ratios(time_in_turns(optimizers, shapes, "ordinary", args.repeats))
    return result | _torch(shapes["w"], args.repeats, result["adamw"]["ms"])


def _torch(shape: tuple[int, ...], repeats: int, base: float) -> dict[str, Any]:
    """PyTorch's AdamW, and MoFO as its authors wrote it, where it is installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(os.cpu_count() or 1)
    fixed = torch.randn(shape)

    def run(step: Callable[[], None], parameter: Any) -> dict[str, Any]:
        times = []
        for _ in range(5 + repeats):
            parameter.grad = 1e-3 * (fixed + 3 * torch.randn(shape))
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        ms = statistics.median(times[5:])
        return {"ms": ms, "ratio": ms / base}

    def adamw(**kind: bool) -> dict[str, Any]:
        parameter = torch.nn.Parameter(torch.zeros(shape))
        return run(torch.optim.AdamW([parameter], **kind).step, parameter)

    parameter = torch.nn.Parameter(torch.zeros(shape))
    m, v = torch.zeros(shape), torch.zeros(shape)

    @torch.no_grad()
    def released() -> None:
        m.mul_(0.9).add_(parameter.grad, alpha=0.1)
        v.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
        magnitudes = m.abs()
        k = int(0.1 * m.numel())
        threshold = torch.topk(magnitudes.flatten(), k, sorted=False).values.min()
        kept = torch.where(magnitudes >= threshold, m, 0)
        parameter.addcdiv_(kept, v.sqrt().add_(1e-8), value=-1e-3)

    return {
        "torch fused AdamW": adamw(fused=True),
        "torch foreach AdamW": adamw(foreach=True),
        "torch.topk, as released": run(released, parameter),
    }


def compilation(args: Args) -> dict[str, Any]:
    """Llama-2-7B's tree, of shapes only: compile time, memory, extra state."""
    shapes = llama(2, 64, 128, 256) if args.tiny else LLAMA_2_7B
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    result: dict[str, Any] = {"leaves": len(shapes)}
    optimizers = {"adamw": optax.adamw(1e-3), "mofo": mofo(1e-3, weight_decay=1e-4)}
    bytes_of = lambda tree: sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(5):
        for name, optimizer in optimizers.items():
            jax.clear_caches()
            state = jax.eval_shape(optimizer.init, params)
            start = time.perf_counter()
            compiled = step_of(optimizer).lower(params, state, params).compile()
            seconds[name].append(time.perf_counter() - start)
            memory = compiled.memory_analysis()
            result[name] = {
                "temporary_mib": memory.temp_size_in_bytes / 2**20,
                "state_bytes": bytes_of(state),
            }
    for name, values in seconds.items():
        result[name]["seconds"] = statistics.median(values)
    extra = result["mofo"]["state_bytes"] - result["adamw"]["state_bytes"]
    result["extra_bytes_a_block"] = extra / len(shapes)
    result["ratio"] = result["mofo"]["seconds"] / result["adamw"]["seconds"]
    return result


def communication(args: Args) -> dict[str, Any]:
    """What crosses 8 devices: in a process of its own that simulates them."""
    flag = "--xla_force_host_platform_device_count=8"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    command = [sys.executable, "-m", "benchmarks.cost_mesh", *["--tiny"] * args.tiny]
    done = subprocess.run(
        command,
        env=os.environ | {"XLA_FLAGS": flags},
        check=True,
        stdout=subprocess.PIPE,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def growth(args: Args) -> dict[str, Any]:
    """The ratio over the size of a leaf, and over the number of leaves."""
    sizes = [10**3, 10**4] if args.tiny else [10**e for e in range(3, 9)]
    numbers = [1, 10] if args.tiny else [1, 10, 100, 1000]
    optimizers = {"adamw": optax.adamw(1e-3), "mofo": mofo(1e-3)}

    def ratio(shapes: Shapes, repeats: int) -> float:
        times = time_in_turns(optimizers, shapes, "ordinary", repeats)
        value: float = ratios(times)["mofo"]["ratio"]
        return value

    result: dict[str, Any] = {"sizes": [], "leaves": []}
    for size in sizes:
        rows = 10 ** (int(math.log10(size)) // 2)
        shapes: Shapes = {"w": (rows, size // rows)}
        repeats = args.repeats if size < 10**8 else min(args.repeats, 5)
        result["sizes"].append([size, ratio(shapes, repeats)])
    for number in numbers:
        many: Shapes = {f"w{i}": (32, 32) for i in range(number)}
        result["leaves"].append([number, ratio(many, args.repeats)])
    return result


def fine_tuning(args: Args) -> dict[str, Any]:
    """A whole training step of a Llama, batch 8 x 256: loss, gradient and update."""
    from flax import nnx

    from examples.llama.architectures import LlamaConfig
    from examples.llama.model import Llama

    sizes = (256, 64, 128, 2, 4) if args.tiny else (32000, 768, 2048, 12, 12)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    values = dict(zip((*names, *heads), (*sizes, sizes[-1]), strict=True))
    config, vocabulary = LlamaConfig(**values), sizes[0]
    model = Llama(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    shape = (2, 16) if args.tiny else (8, 257)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, vocabulary)

    def make(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, tokens: jax.Array) -> Any:
            def loss(params: Any) -> jax.Array:
                logits = nnx.merge(graph, params)(tokens[:, :-1])
                losses = optax.softmax_cross_entropy_with_integer_labels(
                    logits, tokens[:, 1:]
                )
                return jnp.mean(losses)

            gradients = jax.grad(loss)(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return step

    runs = {}
    for name, optimizer in {"adamw": optax.adamw(1e-5), "mofo": mofo(1e-5)}.items():
        own = jax.tree.map(jnp.copy, params)
        runs[name] = [make(optimizer), own, jax.jit(optimizer.init)(own)]
    batches = ((tokens + i) % vocabulary for i in range(1 + args.repeats))
    return ratios(take_turns(runs, batches, warmup=1))


def _shapes(args: Args, tree: str) -> Shapes:
    return {"w": (64, 64), "b": (64,)} if args.tiny else TREES[tree]


def sections() -> dict[str, Callable[[Args], dict[str, Any]]]:
    measured = {
        f"step: {tree}: {gradients}": functools.partial(
            steps, tree=tree, gradients=gradients
        )
        for tree in TREES
        for gradients in GRADIENTS
    }
    return {
        "compilation": compilation,
        "communication": communication,
        **measured,
        "passes": passes,
        "others": others,
        "growth": growth,
        "fine-tuning": fine_tuning,
    }


def measure(args: Args) -> dict[str, Any]:
    """Runs the sections that the file does not have of these settings yet."""
    settings = {"repeats": args.repeats, "tiny": args.tiny}
    results: dict[str, Any] = {"settings": settings, **environment()}
    if args.output.exists():
        old = json.loads(args.output.read_text())
        if all(old.get(key) == value for key, value in results.items()):
            results = old
    todo = sections()
    bar = tqdm(todo.items(), unit="section", **terminal.bar_style())
    for name, section in bar:
        bar.set_postfix_str(name[:40])
        if name not in results:
            results[name] = section(args)
            write_json(args.output, results)
            jax.clear_caches()
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it and the plots."""
    program = "python -m benchmarks.cost"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line(program):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        results = measure(args)
        table = cost_report.table(results)
        args.output.with_suffix(".md").write_text(table)
        cost_report.plot(results, args.output.with_suffix(".png"))
    print(table)


if __name__ == "__main__":
    main()
