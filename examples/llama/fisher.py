"""Make the Fisher information of a Llama, from texts that it writes itself.

python -m examples.llama.fisher --model DIR --output FILE

Do this once a model. `python -m examples.llama.train --importance FILE` then divides
each step by it, so that what the model knows changes less.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from examples import terminal
from examples.checks import check_least, check_seed
from examples.llama.checkpoints.fisher_files import (
    Origin,
    check_destination,
    save_fisher,
)
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.parameters import DTypeName
from examples.llama.model.sharding import make_mesh, parameter_sharding
from examples.llama.text.tokenizer import load_tokenizer, tokenizer_path
from examples.llama.training.checks import check_dtype
from examples.llama.training.fisher import estimate_self_fisher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    model: Path
    """A Hugging Face directory (config.json, safetensors), GGUF or llama2.c file."""
    tokenizer: Path | None = None
    """A directory with tokenizer.json, or a llama2.c tokenizer; else the model's."""
    output: Path
    """File of safetensors to write. A file of this command is replaced."""
    texts: int = 32
    """Number of texts that the model writes."""
    max_length: int = 256
    """Maximum tokens per text."""
    seed: int = 0
    """Seed of the texts."""
    dense: bool = False
    """Keep a number for each parameter, not only for each row and column of a matrix.
    The file is as large as the model in float32."""
    dtype: DTypeName = "float32"
    """Precision of the computation."""
    param_dtype: DTypeName = "float32"
    """Precision of the parameters."""
    mesh: str = "fsdp=-1"
    """Devices by use, as in data=2,fsdp=4,tensor=2; -1 is as many as there are."""


def make_fisher(args: Args, *, progress: bool = True) -> None:
    """Writes the file.

    Raises:
      ValueError, OSError: An argument or a file is bad. Nothing is written.
    """
    for name, least in (("texts", 1), ("max_length", 2)):
        check_least(name, getattr(args, name), least)
    check_seed(args.seed)
    check_dtype(args.dtype)
    path = tokenizer_path(args.tokenizer, args.model)
    check_destination(args.output)
    mesh = make_mesh(args.mesh)
    model = load_model(
        args.model,
        dtype=args.dtype,
        param_dtype=args.param_dtype,
        sharding=parameter_sharding(mesh),
    )
    model.check_length(args.max_length)
    fisher = estimate_self_fisher(
        model,
        load_tokenizer(path, model.config.vocab_size),
        args.texts,
        args.max_length,
        mesh,
        seed=args.seed,
        factored=not args.dense,
        progress=progress,
    )
    name = args.model.resolve().name
    save_fisher(
        args.output, fisher, Origin(name, args.texts, args.max_length, args.seed)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it with one line and exit code 2."""
    program = "python -m examples.llama.fisher"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("fisher"):
        make_fisher(args)
    print(args.output)


if __name__ == "__main__":
    main()
