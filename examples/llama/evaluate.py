"""Evaluate a Llama on tasks of lm-evaluation-harness, on its knowledge and obedience.

python -m examples.llama.evaluate --model DIR --tasks paper --allow-code-execution
python -m examples.llama.evaluate --model DIR --knowledge world --instructions

`paper` stands for the tasks on which the paper measures what was learnt and what was
forgotten: MMLU (0-shot), HellaSwag, ARC-easy, ARC-challenge, GSM8K (5-shot) and
HumanEval. Data sets come from the Hugging Face hub, or with --include-path from files.
"""

import json
from collections.abc import Sequence

import tyro

from examples import terminal
from examples.files import write_json


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: prints tables, or one line of error with exit code 2."""
    program = "python -m examples.llama.evaluate"
    with terminal.errors_on_one_line("evaluate"):
        # Here, so that without its extra's packages one line says which to install.
        from lm_eval.utils import handle_non_serializable

        from examples.llama.evaluation.evaluate import Args, evaluate, table

        args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
        results = evaluate(args)
        if args.output is not None:
            text = json.dumps(results, default=handle_non_serializable)
            write_json(args.output, json.loads(text))
    print(table(results), end="")


if __name__ == "__main__":
    main()
