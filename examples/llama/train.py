"""Fine-tune a Llama with MoFO, and see what it learns and what it forgets.

python -m examples.llama.train --model DIR --data FILE --output DIR --epochs 2

Reads a Hugging Face, GGUF or llama2.c checkpoint and records of questions and answers,
and leaves in OUTPUT/model a Hugging Face checkpoint, or with --lora-rank a PEFT adapter
in OUTPUT/adapter. Beside it are report.html with the plots, metrics.jsonl and events
for TensorBoard. If a run is stopped or killed, the same command resumes it.
"""

from collections.abc import Sequence

from examples import terminal
from examples.llama.training.loop import train
from examples.llama.training.parsing import parse
from examples.llama.training.setup import join_processes


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Exit codes: 0; 2 for a bad argument, file or disk; 1 for a loss that is not finite;
    143 after SIGTERM and 130 after SIGINT, once a checkpoint is written.
    """
    with terminal.errors_on_one_line("train"):
        config = parse(argv, "python -m examples.llama.train", __doc__)
        if config.distributed:
            join_processes(config)
        train(config)


if __name__ == "__main__":
    main()
