"""Tokens per second of a fine-tuning step, beside PyTorch's and transformers' Llama.

python -m benchmarks.training_speed --output docs/results/training_speed.json

Both train the same shapes on the same random tokens, in turns in one process: ours as
`examples.llama.train` does, with AdamW and with MoFO, the other one a plain loop over
`transformers.LlamaForCausalLM` with `torch.optim.AdamW`, fused. Needs the extras
examples and parity. On a GPU, --no-torch leaves the other one out.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.outputs import make_room
from benchmarks.training_step import (
    SHAPES,
    batch_of,
    prompt_length,
    random_model,
    training_step,
)
from examples import terminal
from examples.checks import check_least, check_name
from examples.environment import environment
from examples.files import write_json
from examples.llama.checkpoints.huggingface_config import to_hugging_face
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.flops import peak_flops, training_flops
from examples.llama.model.llama import REMAT_POLICIES
from examples.llama.model.loss import Batch
from examples.llama.model.parameters import DTypeName
from examples.llama.model.sharding import make_mesh, put_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write."""
    shapes: tuple[str, ...] = ("260K", "24M", "125M")
    """Names among 260K, 24M, 125M and those of examples.llama.model.architectures."""
    batch_size: int = 4
    """Rows of a step."""
    length: int = 256
    """Tokens of a row, none of them padding."""
    answer_share: float = 0.5
    """Share of a row, at its end, that is an answer: what the loss counts."""
    dtype: str = "float32"
    """Precision of the computation."""
    param_dtype: str = "float32"
    """Precision of the parameters."""
    remat: str = "none"
    """See examples.llama.train."""
    repeats: int = 7
    """Steps of each, after two that do not count."""
    torch: bool = True
    """Measure PyTorch as well."""


def ours(args: Args, shape: LlamaConfig, method: str) -> Callable[[np.ndarray], float]:
    """A function of tokens [B, L] that trains a step and returns the loss."""
    mesh = make_mesh("fsdp=1")
    options = {"dtype": args.dtype, "param_dtype": args.param_dtype}
    graph, params = random_model(shape, mesh, remat=args.remat, **options)

    def place(tokens: np.ndarray) -> Batch:
        return put_batch(batch_of(tokens, args.answer_share), mesh, 1)

    size = (args.batch_size, args.length)
    batch = place(np.zeros(size, np.int32))
    step = training_step(graph, params, batch, method, mesh)
    state = step.state

    def run(tokens: np.ndarray) -> float:
        nonlocal state
        state, metrics = step.run(state, place(tokens))
        return float(metrics["loss"])

    return run


def torchs(args: Args, shape: LlamaConfig) -> Callable[[np.ndarray], float]:
    """The same of PyTorch: a loop as its users write it."""
    import torch
    from transformers import LlamaConfig as TorchConfig
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(TorchConfig(**to_hugging_face(shape)))
    model = model.to(getattr(torch, args.param_dtype))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, weight_decay=0.0, fused=True
    )
    # PyTorch's own way to bfloat16 over float32 parameters.
    low = args.dtype != args.param_dtype

    def run(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens).long()
        labels = ids.clone()
        labels[:, : prompt_length(args.length, args.answer_share)] = -100
        with torch.autocast("cpu", getattr(torch, args.dtype), enabled=low):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return run


def measure(args: Args) -> dict[str, Any]:
    """Trains all in turns; see the module. Returns what it writes.

    Raises:
      ValueError: An unknown shape or dtype, or a number is out of range.
    """
    for name, least in {"batch_size": 1, "length": 2, "repeats": 1}.items():
        check_least(name, getattr(args, name), least)
    for name in args.shapes:
        check_name("shapes", name, SHAPES)
    for name in ("dtype", "param_dtype"):
        check_name(name, getattr(args, name), get_args(DTypeName))
    check_name("remat", args.remat, REMAT_POLICIES)
    results: dict[str, Any] = {"settings": dataclasses.asdict(args), **environment()}
    results["settings"].pop("output")
    results["shapes"] = {}
    rng = np.random.default_rng(0)
    peak, source = peak_flops(jax.devices()[0], args.dtype)
    results["peak"] = {"flops": peak, "source": source}
    total = len(args.shapes) * (args.repeats + 2)
    with tqdm(total=total, **terminal.bar_style()) as bar:
        for name in args.shapes:
            bar.set_description(name)
            shape = SHAPES[name]
            runs = {m: ours(args, shape, m) for m in ("adamw", "mofo")}
            if args.torch:
                runs["torch"] = torchs(args, shape)
            times: dict[str, list[float]] = {key: [] for key in runs}
            losses = {}
            for i in range(args.repeats + 2):
                size = (args.batch_size, args.length)
                tokens = rng.integers(shape.vocab_size, size=size, dtype=np.int32)
                # In another order each time: who comes after PyTorch is slower.
                for key in (*runs, *runs)[i % len(runs) :][: len(runs)]:
                    time.sleep(0.3)  # PyTorch's threads spin on after their work
                    start = time.perf_counter()
                    losses[key] = runs[key](tokens)
                    if i > 1:
                        times[key].append(time.perf_counter() - start)
                bar.set_postfix_str(f"loss {losses['mofo']:.2f}", refresh=False)
                bar.update()
            flops = training_flops(shape, args.length)
            results["shapes"][name] = found = {}
            for key, seconds in times.items():
                rate = args.batch_size * args.length / statistics.median(seconds)
                found[key] = {"tokens_per_second": rate, "mfu": rate * flops / peak}
                # Of each pair of steps, because the machine's speed varies.
                others = zip(times["adamw"], seconds, strict=True)
                ratio = statistics.median(b / a for a, b in others)
                found[key]["time_over_our_adamw"] = ratio
            write_json(args.output, results)
    return results


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{'model':8} {'':8} {'tokens/s':>10} {'MFU':>6} {'time over our AdamW':>20}"
    ]
    for name, found in results["shapes"].items():
        for key, x in found.items():
            lines.append(
                f"{name:8} {key:8} {x['tokens_per_second']:10,.0f} {x['mfu']:6.1%} "
                f"{x['time_over_our_adamw']:20.3f}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it as they end examples.llama.train."""
    program = "python -m benchmarks.training_speed"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("training_speed"):
        make_room(args.output)
        print(table(measure(args)))


if __name__ == "__main__":
    main()
