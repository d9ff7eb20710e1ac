"""Continue a text with a Llama, or ask it questions.

python -m examples.llama.generate --model MODEL --prompt TEXT
python -m examples.llama.generate --model MODEL --chat QUESTION
"""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import tyro

from examples import terminal
from examples.checks import check_seed
from examples.llama.checkpoints.loading import check_finite, load_model
from examples.llama.evaluation.conversation import Conversation
from examples.llama.model.generation import generate
from examples.llama.model.llama import Llama
from examples.llama.text.records import Record
from examples.llama.text.templates import prompts
from examples.llama.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_path

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  # lets one edit what one types at `input`


@dataclasses.dataclass(kw_only=True)
class Args:
    model: Path
    """A directory with config.json and safetensors, or a GGUF or llama2.c file."""
    adapter: Path | None = None
    """Directory of a PEFT adapter to load with the model."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a llama2.c tokenizer; by default the model's own."""
    prompt: str = ""
    """The text to continue."""
    chat: str | None = None
    """A message to answer; "-" for a conversation, one message a line of standard
    input, until an empty line."""
    system: str | None = None
    """The system message of a chat."""
    template: Literal["paper", "tokenizer"] = "tokenizer"
    """How a chat becomes text: by the tokenizer's own chat template, or in the format
    that the trainer uses by default."""
    max_new_tokens: int = 256
    """Maximum number of new tokens. The text may end earlier."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 draws from the model's distribution."""
    seed: int = 0
    """Seed for sampling, at a temperature above 0."""


def continue_text(args: Args) -> str:
    """The prompt and its continuation; raises what `generate` and the loaders raise."""
    model, tokenizer = _load(args)
    (prompt,) = prompts([Record(args.prompt, "prompt")], tokenizer, args.template)
    # A model of many stories starts the next one with <s>.
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    new = generate(
        model,
        prompt[None],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        key=jax.random.key(args.seed),
        eos_id=[*start, *tokenizer.eos_ids],
    )
    return tokenizer.decode([*prompt.tolist(), *new[0].tolist()])


def chat(args: Args) -> None:
    """Prints the answers to the messages, each as it is written.

    Raises:
      OSError, ValueError: See `Conversation` and the loaders.
      terminal.Stopped: At a signal; in a conversation on a terminal, SIGINT only ends
        the answer.
    """
    model, tokenizer = _load(args)
    conversation = Conversation(
        model,
        tokenizer,
        template=args.template,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
    )
    assert args.chat is not None, "main checks it"
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty() and args.chat == "-"
    for message in _lines(on_terminal) if args.chat == "-" else [args.chat]:
        _check_text("chat", message)
        dropped, answer = conversation.dropped, conversation.ask(message)
        with terminal.StopRequest() as stop:
            for part in answer:
                print(part, end="", flush=True)
                if stop.signum:
                    break
        answer.close()
        print(flush=True)
        if stop.signum and not (on_terminal and stop.signum == signal.SIGINT):
            raise terminal.Stopped(stop.signum, "stopped")
        if conversation.dropped > dropped:
            print(
                "generate: the conversation is too long for the model; its first "
                f"{conversation.dropped} messages are left out from here on",
                file=sys.stderr,
            )


def _lines(on_terminal: bool) -> Iterator[str]:
    """The lines of standard input up to a blank one, asked for on a terminal."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (line := input("> " if on_terminal else "")).strip():
            yield line


def _load(args: Args) -> tuple[Llama, Tokenizer]:
    check_seed(args.seed)
    for name in ("prompt", "chat", "system"):
        _check_text(name, getattr(args, name) or "")
    path = tokenizer_path(args.tokenizer, args.model)
    model = load_model(args.model, adapter=args.adapter)
    check_finite(model, args.adapter or args.model)
    return model, load_tokenizer(path, model.config.vocab_size)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # of bytes that Python could not decode
        raise ValueError(f"{name}: {error}; expected UTF-8") from None


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: prints the text, or one line of error with exit code 2."""
    program = "python -m examples.llama.generate"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("generate"):
        if args.chat is None:
            if args.system is not None:
                raise ValueError("system needs --chat")
            print(continue_text(args))
        else:
            if args.prompt:
                raise ValueError("prompt and chat exclude each other")
            chat(args)


if __name__ == "__main__":
    main()
