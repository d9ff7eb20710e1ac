"""Memory of the loss over a long vocabulary, chunked and plain.

python -m benchmarks.loss_memory --output docs/results/loss_memory.json

What the compiler reserves beside arguments and results for the loss of Llama 3's head
and its gradient: by `examples.llama.model.loss.cross_entropy_sum`, and by
optax.softmax_cross_entropy_with_integer_labels over all logits. Nothing is run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

from benchmarks.outputs import make_room
from examples import terminal
from examples.checks import check_least, check_name
from examples.environment import environment
from examples.files import write_json
from examples.llama.model.architectures import ARCHITECTURES
from examples.llama.model.loss import cross_entropy_sum
from examples.llama.model.products import float32_einsum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """The JSON file to write."""
    architecture: str = "llama3.2-1b"
    """Whose head, of examples.llama.model.architectures."""
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    """Rows."""
    length: int = 1024
    """Tokens of a row."""


def plain(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array
) -> jax.Array:
    logits = float32_einsum("btd,dv->btv", hidden, head.astype(hidden.dtype))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses, where=mask)


def temporary_bytes(
    loss: Callable[..., jax.Array], shape: tuple[int, int, int, int]
) -> int:
    """What the compiled loss and gradient need beside arguments and results."""
    batch, time, width, vocabulary = shape
    args = (
        jax.ShapeDtypeStruct((batch, time, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((batch, time), jnp.int32),
        jax.ShapeDtypeStruct((batch, time), jnp.bool),
    )
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    memory = gradient.lower(*args).compile().memory_analysis()
    if memory is None:
        raise ValueError("this backend does not say what memory a program needs")
    return memory.temp_size_in_bytes


def measure(args: Args) -> dict[str, Any]:
    """Compiles all, and writes the bytes to `args.output`.

    Raises:
      ValueError: An unknown architecture.
    """
    check_name("architecture", args.architecture, ARCHITECTURES)
    check_least("length", args.length, 1)
    for size in args.batch_sizes:
        check_least("batch_sizes", size, 1)
    config = ARCHITECTURES[args.architecture]
    results: dict[str, Any] = dataclasses.asdict(args) | environment() | {"rows": []}
    del results["output"]
    for batch in args.batch_sizes:
        shape = batch, args.length, config.hidden_size, config.vocab_size
        row = {
            "batch_size": batch,
            "logits_bytes": 4 * batch * args.length * config.vocab_size,
            "plain_bytes": temporary_bytes(plain, shape),
            "chunked_bytes": temporary_bytes(cross_entropy_sum, shape),
        }
        results["rows"].append(row)
    write_json(args.output, results)
    return results


def table(results: dict[str, Any]) -> str:
    names = ("logits", "plain", "chunked")
    lines = ["batch " + "".join(f"{name + ', MiB':>14}" for name in names)]
    for row in results["rows"]:
        sizes = (row[f"{name}_bytes"] / 2**20 for name in names)
        lines.append(f"{row['batch_size']:5} " + "".join(f"{x:14,.0f}" for x in sizes))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it as they end examples.llama.train."""
    program = "python -m benchmarks.loss_memory"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("loss_memory"):
        make_room(args.output)
        print(table(measure(args)))


if __name__ == "__main__":
    main()
