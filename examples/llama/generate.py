"""Continue a text with a Llama, at the likeliest token or drawn at random.

python -m examples.llama.generate --model MODEL --prompt TEXT
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro

from examples import terminal
from examples.checks import check_seed
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.generation import generate
from examples.llama.text.tokenizer import load_tokenizer, tokenizer_path


@dataclasses.dataclass(kw_only=True)
class Args:
    model: Path
    """A directory with config.json and safetensors, or a GGUF or llama2.c file."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a llama2.c tokenizer; by default the model's own."""
    prompt: str = ""
    """The text to continue."""
    max_new_tokens: int = 256
    """How many tokens to add, unless the text ends before."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 draws from the model's distribution."""
    seed: int = 0
    """Of the draws, at a temperature above 0."""


def continue_text(args: Args) -> str:
    """The prompt and its continuation; raises what `generate` and the loaders raise."""
    check_seed(args.seed)
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:  # of bytes that Python could not decode
        raise ValueError(f"prompt: {error}; expected UTF-8") from None
    path = tokenizer_path(args.tokenizer, args.model)
    model = load_model(args.model)
    tokenizer = load_tokenizer(path, model.config.vocab_size)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt = start + tokenizer.encode(args.prompt)
    new = generate(
        model,
        np.array([prompt]),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        key=jax.random.key(args.seed),
        # A model of many stories starts the next one with <s>.
        eos_id=[*start, *tokenizer.eos_ids],
    )
    return tokenizer.decode(prompt + new[0].tolist())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: prints the text, or one line of error with exit code 2."""
    program = "python -m examples.llama.generate"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("generate"):
        text = continue_text(args)
    print(text)


if __name__ == "__main__":
    main()
