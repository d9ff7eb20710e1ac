"""The quickstart, on a smaller schedule."""

import json

import jax
import numpy as np
import pytest
from matplotlib import image

from examples import quickstart


def test_world():
    old, new = quickstart.make_world(seed=1, new_names=30)
    assert old.shape == (1200, 4) and new.shape == (30, 4)
    keys = {tuple(fact) for fact in np.concatenate([old, new])[:, :3].tolist()}
    assert len(keys) == 1230  # no key has two values
    assert old.max() < quickstart.VOCABULARY
    again, _ = quickstart.make_world(seed=1, new_names=30)
    other, _ = quickstart.make_world(seed=2, new_names=30)
    assert (old == again).all() and (old != other).any()


@jax.numpy_dtype_promotion("standard")  # optax.adamw divides float by int
def test_quickstart(tmp_path, monkeypatch, capsys):
    rates = {
        "AdamW": (3e-4, 1e-3),
        "MoFO 10%": (1e-3, 3e-3),
        "keep 10%": (1e-3, 4e-3),
    }
    monkeypatch.setattr(quickstart, "LEARNING_RATES", rates)
    config = quickstart.Config(output=tmp_path / "out", steps=60)
    runs = quickstart.main(config)
    found = {(run["method"], run["learning_rate"]): run for run in runs}
    assert list(found) == [(name, rate) for name in rates for rate in rates[name]]
    # All learn the new facts. With the larger learning rate they forget more old ones.
    assert all(run["new_facts"] > 0.9 for run in runs)
    for name, (small, large) in rates.items():
        some, more = found[name, small], found[name, large]
        assert 1 >= some["old_facts"] > more["old_facts"]
        assert some["loss"] > more["loss"] and 0 < some["distance"] < more["distance"]
    # At the same learning rate MoFO forgets less than AdamW, and learns less.
    adamw, mofo = found["AdamW", 1e-3], found["MoFO 10%", 1e-3]
    assert mofo["old_facts"] > adamw["old_facts"] + 0.1 and mofo["loss"] > adamw["loss"]
    # At the same loss keep forgets least.
    kept = quickstart.old_facts_at_loss(runs, 0.01)
    assert kept["keep 10%"] > max(kept["AdamW"], kept["MoFO 10%"]) + 0.1

    printed = capsys.readouterr().out
    assert str(tmp_path / "out" / "quickstart.png") in printed
    assert quickstart.sentence_at_loss(runs) in printed
    written = json.loads((tmp_path / "out" / "quickstart.json").read_text())
    assert written["runs"] == runs
    picture = image.imread(tmp_path / "out" / "quickstart.png")
    assert picture.shape[0] > 300 and picture.std() > 0.05


def curve(method, kept, losses=(0.1, 0.01, 0.001)):
    return [
        {"method": method, "loss": loss, "old_facts": share}
        for loss, share in zip(losses, kept, strict=True)
    ]


def test_old_facts_at_the_same_loss():
    # On the logarithm of the loss, in the middle between two runs.
    line = curve("line", (0.9, 0.5, 0.1))
    assert quickstart.old_facts_at_loss(line, 0.1**1.5) == {"line": pytest.approx(0.7)}
    runs = [
        *curve("early", (0.9, 0.8, 0.7), (0.3, 0.2, 0.1)),
        *curve("late", (0.3, 0.2, 0.1), (3e-3, 2e-3, 1e-3)),
        *curve("one", (0.5,), (0.01,)),
        *curve("diverged", (0.5, 0.4), (float("nan"), float("inf"))),
        *curve("spans it", (0.9, 0.75, 0.1)),
    ]
    assert quickstart.old_facts_at_loss(runs, 0.01) == {"spans it": pytest.approx(0.75)}


def test_the_title_says_what_the_numbers_say():
    adamw, mofo = curve("AdamW", (0.9, 0.744, 0.1)), curve("MoFO 10%", (1, 0.73, 0.1))
    keep = curve("keep 10%", (0.9, 0.87, 0.8))
    assert quickstart.title_at_loss(adamw + mofo + keep) == (
        "At a loss of 0.01, keep forgets the fewest old facts\n"
        "Recalled: AdamW 74%, MoFO 73%, keep 87%"
    )
    assert quickstart.sentence_at_loss(adamw + mofo + keep) == (
        "At a loss of 0.01 on the new facts, AdamW recalls 74% of the old ones, "
        "MoFO 73% and keep 87%."
    )
    # Another method may be ahead, or none by a point.
    assert "AdamW forgets the fewest" in quickstart.title_at_loss(adamw + mofo)
    near = curve("keep 10%", (0.9, 0.751, 0.1))
    assert quickstart.title_at_loss(adamw + near) == (
        "At a loss of 0.01 on the new facts\nRecalled: AdamW 74%, keep 75%"
    )


def test_a_method_without_a_number_is_not_compared():
    short = curve("AdamW", (0.9, 0.8), (0.1, 0.05))
    keep = curve("keep 10%", (0.9, 0.87, 0.8))
    assert quickstart.title_at_loss(short + keep) == (
        "At a loss of 0.01 on the new facts\nRecalled: keep 87%"
    )
    assert quickstart.sentence_at_loss(short + keep) == (
        "At a loss of 0.01 on the new facts, keep recalls 87% of the old ones; "
        "the runs of AdamW do not span it."
    )
    assert quickstart.title_at_loss(short) == "At the same loss on the new facts"
    assert quickstart.sentence_at_loss(short) == (
        "No method's runs span a loss of 0.01 on the new facts."
    )


def test_fisher_is_of_the_models_own_answers():
    old, _ = quickstart.make_world(seed=1, new_names=1)
    graphdef, params = quickstart.make_model(quickstart.Config(hidden_size=8))
    key = jax.random.key(1)
    fisher = quickstart.own_fisher(key, graphdef, params, old)
    without_answers = old.at[:, -1].set(0)
    again = quickstart.own_fisher(key, graphdef, params, without_answers)
    jax.tree.map(np.testing.assert_array_equal, fisher, again)
    dense = quickstart.own_fisher(key, graphdef, params, old, factored=False)
    assert jax.tree.map(np.shape, dense) == jax.tree.map(np.shape, params)
    (head,) = jax.tree.leaves(dense["lm_head"])
    rows, columns = jax.tree.leaves(fisher["lm_head"])
    np.testing.assert_allclose(rows, head.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(columns, head.mean(-2), rtol=1e-5)
    assert head.min() >= 0 and head.max() > 0


@jax.numpy_dtype_promotion("standard")
def test_gives_up_clearly(tmp_path):
    config = quickstart.Config(output=tmp_path, pretraining_steps=20)
    with pytest.raises(ValueError, match=r"after 20 steps .* --pretraining-steps"):
        quickstart.main(config)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--pretraining-steps=19", "pretraining_steps must be 20 or above, got 19"),
        ("--hidden-size=63", "hidden_size must be a multiple of 8, got 63"),
        ("--hidden-size=0", "hidden_size must be a multiple of 8, got 0"),
        ("--seed=-1", "seed must be 0 to 4294967295, got -1"),
        ("--steps=0", "steps must be 1 or above, got 0"),
        ("--new-names=401", "new_names must be 1 to 400, got 401"),
        ("--output=file", "File exists: 'file'"),
        ("--output=file/below", "Not a directory: 'file/below'"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, option, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        quickstart.command([option])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("quickstart: ") and err.endswith(message + "\n")
    assert err.count("\n") == 1
