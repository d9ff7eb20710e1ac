"""The documents quote the results' files, and these are complete."""

import collections
import json
import re
from pathlib import Path

import pytest

from benchmarks import (
    accelerators_report,
    facts_report,
    forgetting_report,
    situations,
)
from benchmarks.facts_variants import VARIANTS
from benchmarks.forgetting_methods import METHODS
from benchmarks.quoted_tables import QUOTED, renew
from examples import quickstart
from examples.llama import plan

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
REPORTS = {
    "forgetting_stories260k": forgetting_report.report,
    "forgetting_stories260k_1000": forgetting_report.report,
    "forgetting_stories260k_ablation": forgetting_report.report,
    "forgetting_stories260k_python": forgetting_report.report,
    "smollm2_h200": forgetting_report.report,
    "facts": facts_report.report,
    "accelerators_gpu": accelerators_report.table,
    "accelerators_tpu": accelerators_report.table,
}


@pytest.mark.parametrize("name", REPORTS)
def test_tables_are_of_the_numbers(name):
    results = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == REPORTS[name](results)
    assert (RESULTS / f"{name}.png").exists()


def test_what_is_said_of_the_ablation():
    text = (ROOT / "docs" / "keep.md").read_text()
    part = text[text.index("## Which parts matter") : text.index("## What it does not")]
    table = (RESULTS / "forgetting_stories260k_ablation.md").read_text()
    quoted = re.findall(r"\b[12]\.\d{3}\b", part)
    assert len(quoted) > 15 and not [x for x in quoted if x not in table]


def test_situations_are_of_the_numbers():
    assert (RESULTS / "situations.md").read_text() == situations.report(RESULTS)


@pytest.mark.parametrize(
    "name",
    ["forgetting_stories260k", "forgetting_stories260k_python", "smollm2_h200"],
)
def test_every_seed_there_has_the_whole_curve(name):
    results = json.loads((RESULTS / f"{name}.json").read_text())
    found = forgetting_report.measured(results, "kl")
    there = {run["method"] for run in results["runs"]}
    assert found.keys() == there <= METHODS.keys()
    assert min(map(len, found.values())) >= 3
    for method in there:
        points = collections.Counter(
            run["seed"] for run in results["runs"] if run["method"] == method
        )
        assert len({*points.values()}) == 1, "a seed lacks a point that another has"


def test_every_variant_there_is_complete():
    results = json.loads((RESULTS / "facts.json").read_text())
    there = {run["variant"] for run in results["runs"]}
    assert there <= VARIANTS.keys()
    seeds = {name: len(facts_report.curve(results, name, "kl")) for name in there}
    assert min(seeds.values()) >= 1


@pytest.mark.parametrize("name", sorted(x.stem for x in RESULTS.glob("plan_*.json")))
def test_plans_are_of_the_numbers(name):
    path = RESULTS / f"{name}.json"
    results = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == plan.table(results)


@pytest.mark.parametrize("document", ["README.md", "docs/fine_tuning.md"])
def test_what_is_said_of_the_plan(document):
    plans = json.loads((RESULTS / "plan_llama3.2-1b.json").read_text())["plans"]
    adamw, mofo, keep = (run["seconds"] for run in plans)
    text = " ".join((ROOT / document).read_text().split())
    more = [f"{seconds / adamw - 1:.0%}" for seconds in (mofo, keep)]
    assert re.search(" longer .{,40}".join(more), text)


@pytest.mark.parametrize(
    "document", ["README.md", "docs/forgetting.md", "docs/fine_tuning.md"]
)
def test_tables_are_quoted_as_they_are(document):
    text = (ROOT / document).read_text()
    assert len(QUOTED.findall(text)) >= 1
    assert renew(text, ROOT) == text


def test_a_quoted_table_is_renewed(tmp_path):
    (tmp_path / "new.md").write_text("# A\n\n| x |\n|---|\n| 2 |\n\n| y |\n")
    comment = "<!-- First table of new.md -->\n\n"
    found = renew(f"| x |\n\n{comment}| x |\n|---|\n| 1 |\n\nText.\n", tmp_path)
    assert found == f"| x |\n\n{comment}| x |\n|---|\n| 2 |\n\nText.\n"
    (tmp_path / "new.md").write_text("Text.\n")
    with pytest.raises(ValueError, match="no table"):
        renew(comment, tmp_path)


def quickstart_runs():
    return json.loads((RESULTS / "quickstart.json").read_text())["runs"]


def test_the_quickstarts_results_are_of_its_methods():
    there = [(run["method"], run["learning_rate"]) for run in quickstart_runs()]
    rates = quickstart.LEARNING_RATES
    assert there == [(method, rate) for method in rates for rate in rates[method]]


@pytest.mark.parametrize("document", ["README.md", "docs/index.md"])
def test_the_quickstarts_numbers_are_quoted_as_they_are(document):
    runs = quickstart_runs()
    text = " ".join((ROOT / document).read_text().split())
    assert quickstart.sentence_at_loss(runs) in text
    for loss, words in (
        (0.003, "At a loss of 0.003 the shares are"),
        (0.03, "at 0.03 they are"),
    ):
        adamw, mofo, keep = quickstart.old_facts_at_loss(runs, loss).values()
        assert f"{words} {adamw:.0%}, {mofo:.0%} and {keep:.0%}" in text
