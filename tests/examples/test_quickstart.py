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
    monkeypatch.setattr(quickstart, "LEARNING_RATES", (1e-3,))
    config = quickstart.Config(output=tmp_path / "out", steps=60)
    runs = {run["method"]: run for run in quickstart.main(config)}
    assert set(runs) == {"AdamW", "MoFO 10%", "MoFO 3%"}
    # All learn the new facts; the fewer entries move, the more of the old are kept.
    assert all(run["new_facts"] > 0.9 for run in runs.values())
    kept = [runs[m]["old_facts"] for m in ("AdamW", "MoFO 10%", "MoFO 3%")]
    assert kept[0] < kept[1] - 0.1 < kept[2] - 0.2 and kept[2] < 1
    moved = [runs[m]["distance"] for m in ("AdamW", "MoFO 10%", "MoFO 3%")]
    assert moved[0] > moved[1] > moved[2] > 0

    printed = capsys.readouterr().out
    assert "MoFO 10%" in printed and str(tmp_path / "out" / "quickstart.png") in printed
    written = json.loads((tmp_path / "out" / "quickstart.json").read_text())
    assert written["runs"] == list(runs.values())
    picture = image.imread(tmp_path / "out" / "quickstart.png")
    assert picture.shape[0] > 300 and picture.std() > 0.05


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
