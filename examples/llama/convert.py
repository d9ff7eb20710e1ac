"""Convert a model of Hugging Face, GGUF or llama2.c to one of the first two.

python -m examples.llama.convert --model FILE.gguf --output DIR
python -m examples.llama.convert --model DIR --to gguf --dtype q8_0 --output FILE.gguf
python -m examples.llama.convert --model DIR --adapter DIR --output DIR
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import tyro

from examples import terminal
from examples.checks import check_name
from examples.llama.checkpoints.directories import write_sums
from examples.llama.checkpoints.gguf_export import (
    Kind,
    check_gguf_destination,
    save_gguf,
)
from examples.llama.checkpoints.huggingface import check_destination, save_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.lora import merge_lora
from examples.llama.model.parameters import DTypeName
from examples.llama.text.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    tokenizer_path,
)

# What each --dtype is called in GGUF.
KINDS: dict[str, Kind] = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "q8_0": "Q8_0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    model: Path
    """A directory of Hugging Face's, a GGUF file or a llama2.c checkpoint."""
    tokenizer: Path | None = None
    """A llama2.c tokenizer, or a directory with tokenizer.json; else the model's."""
    adapter: Path | None = None
    """Directory of a PEFT adapter to merge into the model."""
    to: Literal["huggingface", "gguf"] = "huggingface"
    """The format to write. GGUF is for llama.cpp and Ollama."""
    output: Path
    """The directory to write, or the .gguf file, which gets a Modelfile for Ollama."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32"
    """Precision of the weights that are written. q8_0, only for GGUF, takes 8.5 bits a
    weight."""


def convert(args: Args) -> None:
    """Writes model and tokenizer.

    Raises:
      ValueError, OSError: An argument or a file is bad, or GGUF cannot express the
        tokenizer. Nothing is written.
    """
    path = tokenizer_path(args.tokenizer, args.model)
    if args.to == "gguf":
        check_gguf_destination(args.output)
    else:
        check_name("dtype", args.dtype, get_args(DTypeName))
        check_destination(args.output)
    model = load_model(
        args.model,
        param_dtype="float32" if args.dtype == "q8_0" else args.dtype,
        adapter=args.adapter,
    )
    merge_lora(model)
    tokenizer = load_tokenizer(path, model.config.vocab_size)
    if args.to == "gguf":
        save_gguf(model, tokenizer, args.output, kind=KINDS[args.dtype])
    else:
        save_hugging_face(model, args.output, source=args.model)
        save_tokenizer(tokenizer, args.output)
        write_sums(args.output)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it with one line and exit code 2."""
    program = "python -m examples.llama.convert"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("convert"):
        convert(args)
    print(args.output)


if __name__ == "__main__":
    main()
