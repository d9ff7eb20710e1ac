"""The study on the quickstart's facts: short runs, and tables of made-up curves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import facts, facts_report
from benchmarks.facts_optimizers import Context, falling, rising
from benchmarks.facts_variants import VARIANTS
from examples import quickstart
from examples.quickstart import make_model


# Other tasks have the same optimizers.
@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if not v.group])
def test_every_variant_is_an_optimizer(name):
    """It lowers a quadratic; what is filtered moves an alpha of the entries."""
    start = {
        "layers.0.up_proj.kernel": jnp.linspace(0.5, 2.0, 60).reshape(6, 10),
        "lm_head.kernel": jnp.ones((4, 5)),
        "norm": jnp.full(4, 0.5),
    }
    ones = jax.tree.map(jnp.ones_like, start)
    variant = VARIANTS[name]
    context = Context(1e-2, optax.linear_schedule(1.0, 0.0, 2), start, ones)
    optimizer = variant.optimizer(context)

    def loss(params):
        return optax.tree.norm(params, squared=True) / 2

    params, state = start, optimizer.init(start)
    for i in range(2):
        gradients = jax.grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
            updates, state = optimizer.update(gradients, state, params)
        kernel = updates["layers.0.up_proj.kernel"]
        if i == 0 and "10%" in variant.title:
            assert np.count_nonzero(kernel) == 6
            assert np.count_nonzero(updates["norm"]) == 4
        params = optax.apply_updates(params, updates)
    assert loss(params) < loss(start)


def test_alpha_schedules():
    context = Context(1e-2, optax.linear_schedule(1.0, 0.0, 100), None, None)
    for schedule, ends in ((falling, (0.2, 0.02)), (rising, (0.02, 0.2))):
        alpha = schedule(context)
        np.testing.assert_allclose([alpha(0), alpha(100)], ends, rtol=1e-6)


def short(monkeypatch, names, **changes):
    for name in names:
        variant = VARIANTS[name]._replace(steps=4, hidden_size=16, **changes)
        monkeypatch.setitem(VARIANTS, name, variant)

    # What an untrained model "knows" can be forgotten as well.
    monkeypatch.setattr(quickstart, "pretrain", lambda config, old: make_model(config))


@pytest.mark.slow
def test_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    names = ("adamw, usual", "ewc", "self", "wise-ft")
    short(monkeypatch, names, rates=(1e-3, 1e-2), batch_size=50)
    output = tmp_path / "facts.json"
    flags = [f"--output={output}", "--variants", *names]
    facts.main([*flags, "--seeds=1"])
    results = json.loads(output.read_text())
    assert len(results["runs"]) == 2 * len(names)
    assert output.with_suffix(".md").read_text() in capsys.readouterr().out
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    by_name = {(run["variant"], run["rate"]): run for run in results["runs"]}
    usual, halfway = by_name["adamw, usual", 1e-2], by_name["wise-ft", 1e-2]
    assert halfway["distance"] == pytest.approx(0.7 * usual["distance"], rel=1e-4)
    assert by_name["ewc", 1e-2]["kl"] != usual["kl"]
    assert by_name["self", 1e-2]["kl"] < usual["kl"]
    assert 0 < usual["touched"] <= 1 and usual["kl"] > 0
    assert usual["device"] and usual["versions"]["jax"] == jax.__version__

    done = results["runs"]
    facts.main([*flags, "--seeds=2"])
    runs = json.loads(output.read_text())["runs"]
    assert runs[: len(done)] == done and len(runs) == 2 * len(done)


def made_up(gap=5.0):
    runs = []
    for seed in range(3):
        for name, shift in (("adamw, usual", 0.0), ("mofo, usual", gap)):
            for i, rate in enumerate(VARIANTS[name].rates):
                loss = 10.0 ** (0.5 - 0.75 * i)
                kept = 0.8 + 0.1 * np.log10(loss) + 0.01 * (seed + shift)
                runs.append(
                    {
                        "variant": name,
                        "rate": rate,
                        "seed": seed,
                        "loss": loss,
                        "old_facts": kept,
                        "kl": 0.1 - shift / 100,
                    }
                )
    return {"runs": runs, "device": "abacus", "versions": {"jax": "1"}}


def test_gaps_at_matched_losses(tmp_path):
    rows = facts_report.gaps(made_up(), "old_facts", 0.03)
    assert rows.keys() == {"adamw, usual", "mofo, usual"}
    assert rows["adamw, usual"].gap == 0 and rows["mofo, usual"].seeds == 3
    assert rows["mofo, usual"].gap == pytest.approx(5, abs=1e-6)
    mean = 80 + 10 * np.log10(0.03) + 6
    assert rows["mofo, usual"].mean == pytest.approx(mean, abs=1e-6)
    text = facts_report.report(made_up())
    row = next(x for x in text.splitlines() if x.startswith("| usual | MoFO 10%"))
    assert [x.strip() for x in row.split("|")[5:7]] == ["+5.0", "+5.0 to +5.0"]
    facts_report.plot(made_up(), tmp_path / "x.png")
    assert not facts_report.gaps(made_up(), "kl", 1e-6)


def test_runs_of_several_machines():
    """Older files have one device and versions for all that have none themselves."""
    results = made_up()
    results["runs"][-1] |= {"device": "Z3", "versions": {"jax": "2"}}
    assert "jax 1; jax 2, on Z3, abacus. Written" in facts_report.report(results)
    results = made_up()
    made = {name: results.pop(name) for name in ("device", "versions")}
    results["runs"] = [run | made for run in results["runs"]]
    assert facts_report.report(results) == facts_report.report(made_up())


def test_bad_arguments(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text('{"runs": [{"method": "adamw"}]}')
    for flags, message in (
        (["--variants", "sgd"], "variants must be among adamw, usual"),
        (["--seeds=0"], "seeds must be 1 or above, got 0"),
        (["--output=x.txt"], "output must end in .json"),
        ([f"--output={other}"], "other.json: expected a JSON object with runs of"),
    ):
        with pytest.raises(SystemExit):
            facts.main([f"--output={tmp_path / 'x.json'}", *flags])
        assert message in capsys.readouterr().err
