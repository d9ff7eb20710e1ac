"""What to run in which situation, in one table of the studies' numbers.

python -m benchmarks.situations --results docs/results

Reads what benchmarks.forgetting and benchmarks.facts wrote, and writes situations.md
beside them. Rows and columns without complete curves are left out.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from benchmarks import facts_report, forgetting_report
from benchmarks.matched_table import span
from examples import terminal
from examples.files import read_json_object
from examples.llama.reporting.measured import MEASURES
from mofo_jax.continual import Comparison, bootstrap_interval, value_at_loss

# The middle one of the held-out losses that the studies compare at.
PAIRS = {
    "stories, then GSM8K": "forgetting_stories260k",
    "stories, then Python": "forgetting_stories260k_python",
}
FACTS_LOSS = 0.01


class Situation(NamedTuple):
    """A row of the table."""

    have: str  # what the reader can spare
    run: str  # flags of the trainer
    method: str  # of the frontier
    variant: str  # of the facts


SITUATIONS = (
    Situation("to compare with", "`--method adamw`", "adamw", "adamw, usual"),
    Situation("as published", "`--method mofo`", "mofo", "mofo, usual"),
    Situation("nothing to spare", "`--method gain`", "gain", "gain"),
    Situation("some megabytes", "`--method keep`", "keep", "keep"),
    Situation(
        "room for two more copies of the parameters",
        "`--method keep --regularize ewc:0.03 --fisher-data self`",
        "keep-ewc",
        "keep ewc",
    ),
    Situation(
        "a quarter more time",
        "`--method keep --replay self:0.25`",
        "keep-self",
        "keep self",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    results: Path
    """The directory of the studies' JSON files."""


def share(results: dict[str, Any], method: str, measure: str) -> np.ndarray | None:
    """What a method forgets over what AdamW does, by seed, at the middle loss.

    Args:
      results: What benchmarks.forgetting wrote.
      method: A name there.
      measure: "kl", or "retain_loss", from which the pretrained model's is subtracted.

    Returns:
      [seeds]; None where the method or AdamW does not reach the loss with every seed.
    """
    found = forgetting_report.curves(results, measure)
    if method not in found or "adamw" not in found:
        return None
    seeds = min(len(found[method]), len(found["adamw"]))
    before = results["pretrained"][measure]
    forgotten, base = (
        value_at_loss(found[name][:seeds], middle(results)) - before
        for name in (method, "adamw")
    )
    shares: np.ndarray = forgotten / base
    return None if np.isnan(shares).any() else shares


def middle(results: dict[str, Any]) -> float:
    """The middle one of the losses that the report compares at."""
    losses = forgetting_report.targets(forgetting_report.curves(results, "kl"))
    return losses[1]


def report(directory: Path) -> str:
    """Markdown: a row for each situation."""
    files = {pair: directory / f"{name}.json" for pair, name in PAIRS.items()}
    studies = {k: read_json_object(v) for k, v in files.items() if v.exists()}
    facts = facts_report.gaps(
        read_json_object(directory / "facts.json"), "old_facts", FACTS_LOSS
    )
    columns: dict[str, dict[str, str]] = {}
    for pair, study in studies.items():
        for measure in forgetting_report.FORGOTTEN:
            head = f"{pair}, at {middle(study):.3g}: {MEASURES[measure].name}"
            columns[head] = {
                row.method: _percent(share(study, row.method, measure))
                for row in SITUATIONS
            }
    if any(facts[row.variant].gap for row in SITUATIONS if row.variant in facts):
        columns[f"facts, at {FACTS_LOSS}"] = {
            row.method: _points(facts.get(row.variant)) for row in SITUATIONS
        }
    lines = [
        "# What to run",
        "",
        "For the pairs of texts: what is forgotten, as a share of what AdamW forgets "
        "at the same held-out loss, the middle one of those that the study compares "
        "at. It is measured by the loss on the retained text above the pretrained "
        "model's, and by the KL from the pretrained model. For the facts: how many "
        "percentage points more of the old facts are recalled than with AdamW at the "
        "same loss on the new ones. In parentheses, 95% bootstrap intervals over "
        "seeds. Written by `python -m benchmarks.situations`.",
        "",
        f"| you have | run | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row in SITUATIONS:
        cells = [column[row.method] for column in columns.values()]
        if any(cells):
            lines.append(f"| {' | '.join([row.have, row.run, *cells])} |")
    return "\n".join([*lines, ""])


def _percent(shares: np.ndarray | None) -> str:
    if shares is None:
        return ""
    if (shares == 1).all():
        return "100%"
    limits = span(bootstrap_interval(shares), ".0%")
    return f"{shares.mean():.0%} ({limits})" if limits else f"{shares.mean():.0%}"


def _points(gap: Comparison | None) -> str:
    if gap is None or not gap.gap:
        return ""
    limits = span(gap.interval, "+.1f")
    return f"{gap.gap:+.1f} ({limits})" if limits else f"{gap.gap:+.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; errors end it as they end examples.llama.train."""
    program = "python -m benchmarks.situations"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("situations"):
        text = report(args.results)
        (args.results / "situations.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
