"""Convert a llama2.c file, or a Hugging Face checkpoint, to a Hugging Face directory.

python -m examples.llama.convert --model FILE --tokenizer FILE --output DIR
python -m examples.llama.convert --model DIR --adapter DIR --output DIR
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from examples import terminal
from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.lora import merge_lora
from examples.llama.model.parameters import DTypeName
from examples.llama.text.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    tokenizer_path,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    model: Path
    """A llama2.c checkpoint, or a directory of Hugging Face's."""
    tokenizer: Path | None = None
    """A llama2.c tokenizer, or a directory with tokenizer.json; else the model's."""
    adapter: Path | None = None
    """Directory of a PEFT adapter to merge into the model."""
    output: Path
    """The directory to write."""
    dtype: DTypeName = "float32"
    """Of the weights in it."""


def convert(args: Args) -> None:
    """Writes model and tokenizer as a Hugging Face directory; errors as of both."""
    path = tokenizer_path(args.tokenizer, args.model)
    model = load_model(args.model, param_dtype=args.dtype, adapter=args.adapter)
    merge_lora(model)
    tokenizer = load_tokenizer(path, model.config.vocab_size)
    save_hugging_face(model, args.output, source=args.model)
    save_tokenizer(tokenizer, args.output)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it with one line and exit code 2."""
    program = "python -m examples.llama.convert"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("convert"):
        convert(args)
    print(args.output)


if __name__ == "__main__":
    main()
