"""Fine-tune on one task after another, and see what each costs the ones before.

python -m examples.llama.continual --tasks DIR DIR DIR --model DIR --output DIR

A task is a directory with train.json, eval.json and test.json, records of "prompt" and
"answer" as in TRACE; --trace DIR has TRACE's eight, in their order. After each, the
model answers the tests of all, which fills a matrix of scores. Every other flag is of
examples.llama.train. If it is stopped or killed, the same command resumes it.
"""

import sys
from collections.abc import Sequence

import tyro

from examples import terminal
from examples.llama.reporting.task_scores import table


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit codes as in examples.llama.train."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with terminal.errors_on_one_line("continual"):
        # Here, so that without its extra's packages one line says which to install.
        from examples.llama.training.sequence import PROGRAM, Args, run

        args, flags = tyro.cli(
            Args,
            prog=PROGRAM,
            args=argv,
            description=__doc__,
            return_unknown_args=True,
        )
        results = run(args, flags)
    print(table(results))
    print(f"scores: {args.output / 'scores.json'}\nplot: {args.output / 'scores.png'}")


if __name__ == "__main__":
    main()
