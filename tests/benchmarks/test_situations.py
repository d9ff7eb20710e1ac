"""The table of situations, of studies whose curves are known."""

import json

import numpy as np
import pytest

from benchmarks import situations
from benchmarks.facts_variants import VARIANTS
from tests.benchmarks.test_forgetting import SHIFTS, made_up


def write_studies(root, seeds=3, variants=("adamw, usual", "keep")):
    for name in situations.PAIRS.values():
        (root / f"{name}.json").write_text(json.dumps(made_up(seeds)))
    rng, runs = np.random.default_rng(0), []
    for seed in range(seeds):
        offset = 0.01 * rng.normal()
        for name in variants:
            gain = 0.0 if name == "adamw, usual" else 0.12
            rates = VARIANTS[name].rates
            losses = np.geomspace(0.2, 0.001, len(rates))
            for rate, loss in zip(rates, losses, strict=True):
                kept = 0.8 + 0.05 * np.log(loss) / np.log(10) + gain + offset
                run = {"variant": name, "rate": rate, "seed": seed}
                runs.append(run | {"loss": loss, "old_facts": kept, "kl": 0.1})
    (root / "facts.json").write_text(json.dumps({"runs": runs}))


def test_shares():
    """AdamW forgets (3 - x)^2 / 4 at a loss x, MoFO 0.1 less."""
    results = made_up()
    results["pretrained"]["retain_loss"] = 1.9
    loss = situations.middle(results)
    assert loss == pytest.approx(2.35)
    forgotten = (3 - loss) ** 2 / 4 + 0.1
    shares = situations.share(results, "mofo", "retain_loss")
    expected = (forgotten + SHIFTS["mofo"]) / forgotten
    np.testing.assert_allclose(shares, np.full(3, expected), atol=0.03)
    assert (situations.share(results, "adamw", "kl") == 1).all()
    assert situations.share(results, "hft", "kl") is None  # elsewhere
    assert situations.share(results, "gain", "kl") is None  # not there


def test_table(tmp_path, capsys):
    write_studies(tmp_path)
    situations.main(["--results", str(tmp_path)])
    text = (tmp_path / "situations.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head, adamw, mofo, keep = rows  # what has no curve has no row
    assert len(head) == 2 + 2 * len(situations.PAIRS) + 1
    assert head[-1] == "facts, at 0.01 |" and adamw[-1] == mofo[-1] == " |"
    assert keep[1] == "`--method keep`" and set(keep[2:-1]) == {""}
    assert keep[-1] == "+12.0 (+12.0 to +12.0) |"
    assert "at 2.35" in head[2] and "KL" in head[3]
    assert set(adamw[2:-1]) == {"100%"}
    assert mofo[1] == "`--method mofo`"
    share = situations.share(made_up(), "mofo", "retain_loss")
    assert mofo[2].startswith(f"{share.mean():.0%} (")


def test_without_variants_facts_have_no_column(tmp_path):
    write_studies(tmp_path, variants=["adamw, usual"])
    assert "facts, at" not in situations.report(tmp_path)


def test_a_missing_study(tmp_path, capsys):
    write_studies(tmp_path)
    (tmp_path / "facts.json").unlink()
    with pytest.raises(SystemExit) as stop:
        situations.main(["--results", str(tmp_path)])
    assert stop.value.code == 2
    assert "facts.json" in capsys.readouterr().err
