"""What a fine-tuning step costs with MoFO, with gain and with keep, beside AdamW's.

python -m benchmarks.cost_fine_tuning --output docs/results/cost_fine_tuning.json

The time of the trainer's compiled step, in turns in one process; the memory that the
compiler reserves for it; and, with --model, what it takes to make the Fisher
information that keep needs. In the timed steps that information is made up: it
decides which entries move, not how long it takes. Writes JSON after each part and a
table beside it. Started again, it adds the shapes that the file lacks.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from benchmarks.outputs import load, make_room
from benchmarks.training_step import SHAPES, batch_of, random_model, training_step
from benchmarks.turns import ratios, take_turns
from examples import terminal
from examples.checks import check_least, check_name
from examples.compilation import Stopwatch
from examples.environment import environment
from examples.files import write_json
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.loss import Batch
from examples.llama.model.sharding import make_mesh, parameter_sharding, put_batch
from examples.llama.text.tokenizer import load_tokenizer
from examples.llama.training.fisher import estimate_fisher
from examples.llama.training.own_texts import text_rows, write_texts
from mofo_jax.continual import FactoredFisher

METHODS = ("adamw", "mofo", "gain", "keep")
WARMUP = 3  # steps of each that do not count
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write; a table goes beside it."""
    shapes: tuple[str, ...] = ("260K", "24M")
    """Names among 260K, 24M, 125M and those of examples.llama.model.architectures."""
    model: Path | None = None
    """A model whose Fisher information is made, to time that."""
    tokenizer: Path | None = None
    """Its tokenizer, where that is not beside it."""
    texts: int = 32
    """Number of texts that the model writes for it."""
    batch_size: int = 8
    """Rows of a step."""
    length: int = 256
    """Tokens of a row, and the most of a text."""
    answer_share: float = 0.5
    """Share of a row, at its end, that is an answer: what the loss counts."""
    repeats: int = 15
    """Measured steps of each method."""
    clock: str = "wall"
    """wall, or cpu: the time that the process computes, for a machine that is shared.
    Making the Fisher information is always timed by the wall."""


def measure_shape(args: Args, shape: LlamaConfig) -> dict[str, Any]:
    """Time and memory of each method's step, and the bytes of what they hold."""
    mesh = make_mesh("fsdp=1")
    graph, params = random_model(shape, mesh)
    batches = _batches(args, shape.vocab_size, mesh, args.repeats + WARMUP)
    importance = made_up_fisher(params)
    runs, memory = {}, {}
    for method in METHODS:
        own = jax.tree.map(jnp.copy, params)  # a step overwrites them
        needed = importance if method == "keep" else None
        step = training_step(graph, own, batches[0], method, mesh, needed)
        memory[method] = {
            "peak_bytes": step.peak_bytes,
            "state_bytes": bytes_of(step.state.opt_state),
        }
        runs[method] = [lambda s, _, b, run=step.run: run(s, b), step.state, None]
    times = ratios(take_turns(runs, batches, WARMUP, CLOCKS[args.clock]))
    size = sum(x.size for x in jax.tree.leaves(params))
    return {
        "parameters": size,
        "parameter_bytes": bytes_of(params),
        "methods": {name: times[name] | memory[name] for name in METHODS},
        "fisher_bytes": {
            "factored": bytes_of(importance),
            "full, bfloat16": 2 * size,
            "full, float32": 4 * size,
        },
    }


def made_up_fisher(params: nnx.State) -> Any:
    """Positive factors of each matrix, and positive vectors."""

    def make(leaf: jax.Array) -> Any:
        draw = lambda shape: jnp.asarray(np.exp(rng.normal(size=shape)), jnp.float32)
        if leaf.ndim < 2:
            return draw(leaf.shape)
        *lead, rows, columns = leaf.shape
        return FactoredFisher(draw((*lead, rows)), draw((*lead, columns)))

    rng = np.random.default_rng(0)
    return jax.tree.map(make, params)


def bytes_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure_fisher(args: Args) -> dict[str, Any]:
    """Seconds to write texts, and to take their gradients; and in AdamW's steps.

    Each round does all three. The first does not count; compilation never does.
    """
    assert args.model is not None
    mesh = make_mesh("fsdp=1")
    model = load_model(args.model, sharding=parameter_sharding(mesh))
    config = model.config
    tokenizer = load_tokenizer(args.tokenizer or args.model, config.vocab_size)
    graph, params = nnx.split(model)
    batches = _batches(args, config.vocab_size, mesh, WARMUP)
    own = jax.tree.map(jnp.copy, params)
    adamw = training_step(graph, own, batches[0], "adamw", mesh)
    state, texts, rounds = adamw.state, [], []
    for _ in range(1 + 5):
        steps, drawing, gradients = Stopwatch(), Stopwatch(), Stopwatch()
        with steps:
            for batch in batches:
                state = jax.block_until_ready(adamw.run(state, batch))[0]
        with drawing:
            texts = write_texts(model, tokenizer, args.texts, args.length, seed=0)
        rows = text_rows(texts, args.length, tokenizer.pad_id)
        with gradients:
            jax.block_until_ready(
                estimate_fisher(
                    graph, params, rows, args.texts, mesh, seed=0, factored=True
                )
            )
        step = steps.seconds / len(batches)
        rounds.append((step, drawing.seconds, gradients.seconds))
    measured = np.array(rounds[1:])
    seconds = np.median(measured, axis=0)
    parts = np.median(measured[:, 1:] / measured[:, :1], axis=0)
    total = measured[:, 1:].sum(axis=1) / measured[:, 0]
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "texts": args.texts,
        "tokens": sum(map(len, texts)),
        "step_seconds": seconds[0],
        "drawing": {"seconds": seconds[1], "steps": parts[0]},
        "gradients": {"seconds": seconds[2], "steps": parts[1]},
        "steps": statistics.median(total.tolist()),
    }


def _batches(args: Args, vocabulary: int, mesh: Mesh, count: int) -> list[Batch]:
    """Rows of random tokens, placed on the mesh."""
    rng = np.random.default_rng(0)
    size = args.batch_size, args.length
    draws = [rng.integers(vocabulary, size=size, dtype=np.int32) for _ in range(count)]
    return [put_batch(batch_of(x, args.answer_share), mesh, 1) for x in draws]


def measure(args: Args) -> dict[str, Any]:
    """Measures what the file lacks.

    Raises:
      ValueError: An argument is bad, or the file is of other settings, another device
        or other versions.
      OSError: The model cannot be read.
    """
    limits = {"texts": 1, "batch_size": 1, "length": 2, "repeats": 1}
    for name, least in limits.items():
        check_least(name, getattr(args, name), least)
    for name in args.shapes:
        check_name("shapes", name, SHAPES)
    check_name("clock", args.clock, CLOCKS)
    names = ("batch_size", "length", "answer_share", "repeats", "clock", "texts")
    begun = {"settings": {name: getattr(args, name) for name in names}, **environment()}
    results = load(args.output, begun) or begun | {"shapes": {}}
    todo = [name for name in args.shapes if name not in results["shapes"]]
    with tqdm(total=len(todo) + 1, unit="part", **terminal.bar_style()) as bar:
        for name in todo:
            bar.set_postfix_str(name)
            results["shapes"][name] = measure_shape(args, SHAPES[name])
            write_json(args.output, results)
            jax.clear_caches()
            bar.update()
        if args.model is not None and "fisher" not in results:
            bar.set_postfix_str("Fisher information")
            results["fisher"] = measure_fisher(args)
            write_json(args.output, results)
        bar.update()
    return results


def table(results: dict[str, Any]) -> str:
    """All numbers as Markdown."""
    settings = results["settings"]
    rows, length = settings["batch_size"], settings["length"]
    clock = "Wall time" if settings["clock"] == "wall" else "CPU time of the process"
    lines = [
        "# What a fine-tuning step costs beside AdamW's",
        "",
        f"{results['device']}, jax {results['versions']['jax']}. The trainer's step, "
        f"batch {rows} x {length}, float32. {clock} over AdamW's of the same turn, the "
        f"median and quartiles of {settings['repeats']} turns; memory as the compiler "
        "reserves it, inputs included; the optimizer's state in bytes of parameters.",
        "",
        "| model | method | time over AdamW's | quartiles | peak memory, MiB "
        "| over AdamW's | state |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shape in results["shapes"].items():
        base = shape["methods"]["adamw"]["peak_bytes"]
        for method, found in shape["methods"].items():
            low, high = found["quartiles"]
            peak = found["peak_bytes"]
            state = found["state_bytes"] / shape["parameter_bytes"]
            lines.append(
                f"| {name} | {method} | {found['ratio']:.3f} | {low:.3f} to {high:.3f} "
                f"| {peak / 2**20:.1f} | {peak / base:.4f} | {state:.4f} |"
            )
    forms = list(next(iter(results["shapes"].values()))["fisher_bytes"])
    lines += [
        "",
        "Bytes of the Fisher information, over those of the parameters:",
        "",
        f"| model | {' | '.join(forms)} |",
        "|---" * (1 + len(forms)) + "|",
    ]
    for name, shape in results["shapes"].items():
        shares = [shape["fisher_bytes"][f] / shape["parameter_bytes"] for f in forms]
        lines.append(f"| {name} | {' | '.join(f'{x:.2%}' for x in shares)} |")
    if (fisher := results.get("fisher")) is not None:
        drawing, gradients = fisher["drawing"]["steps"], fisher["gradients"]["steps"]
        lines += [
            "",
            f"A model of {fisher['parameters']:,} parameters makes its Fisher "
            f"information, from {fisher['texts']} texts of {fisher['tokens']:,} tokens "
            f"in all, in the time of {fisher['steps']:.1f} steps of AdamW: "
            f"{drawing:.1f} for writing and {gradients:.1f} for gradients, without "
            "compilation.",
        ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it."""
    program = "python -m benchmarks.cost_fine_tuning"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("cost_fine_tuning"):
        make_room(args.output)
        text = table(measure(args))
        args.output.with_suffix(".md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
