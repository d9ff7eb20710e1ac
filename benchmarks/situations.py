"""What to run in which situation, in one table of the studies' numbers.

python -m benchmarks.situations --results docs/results

Reads what benchmarks.forgetting, benchmarks.facts and benchmarks.cost_fine_tuning
wrote, and writes situations.md beside them.
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
from mofo_jax.continual import bootstrap_interval, value_at_loss

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


def share(results: dict[str, Any], method: str) -> np.ndarray | None:
    """What a method forgets over what AdamW does, by seed, at the middle loss.

    Forgetting is the retained-text loss above the pretrained model's. None where the
    method or AdamW does not reach the loss with every seed.
    """
    found = forgetting_report.curves(results, "retain_loss")
    if method not in found or "adamw" not in found:
        return None
    loss = middle(results)
    seeds = min(len(found[method]), len(found["adamw"]))
    before = results["pretrained"]["retain_loss"]
    forgotten, base = (
        value_at_loss(found[name][:seeds], loss) - before for name in (method, "adamw")
    )
    shares: np.ndarray = forgotten / base
    return None if np.isnan(shares).any() else shares


def middle(results: dict[str, Any]) -> float:
    """The middle one of the losses that the report compares at."""
    losses = forgetting_report.targets(forgetting_report.curves(results, "retain_loss"))
    return losses[1]


def report(directory: Path) -> str:
    """Markdown: a row for each situation."""
    studies = {
        pair: read_json_object(directory / f"{name}.json")
        for pair, name in PAIRS.items()
    }
    facts = read_json_object(directory / "facts.json")
    gaps = facts_report.gaps(facts, "old_facts", FACTS_LOSS)
    heads = [f"{pair}, at {middle(study):.3g}" for pair, study in studies.items()]
    lines = [
        "# What to run",
        "",
        "For the pairs of texts: what is forgotten, as a share of what AdamW forgets "
        "at the same held-out loss (the middle one of those that the studies compare "
        "at). For the facts: how many more old facts, in percentage points, are "
        f"recalled than with AdamW at a loss of {FACTS_LOSS} on the new ones. All with "
        "95% bootstrap intervals over seeds. Written by "
        "`python -m benchmarks.situations`.",
        "",
        f"| you have | run | {' | '.join(heads)} | facts, at {FACTS_LOSS} |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for row in SITUATIONS:
        cells = [row.have, row.run]
        for study in studies.values():
            cells.append(_percent(share(study, row.method)))
        gap = gaps.get(row.variant)
        limits = "" if gap is None or not gap.gap else span(gap.interval, "+.1f")
        cells.append(f"{gap.gap:+.1f} ({limits})" if gap and limits else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _percent(shares: np.ndarray | None) -> str:
    if shares is None:
        return ""
    if (shares == 1).all():
        return "100%"
    return f"{shares.mean():.0%} ({span(bootstrap_interval(shares), '.0%')})"


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
