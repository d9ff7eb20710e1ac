"""Steps are timed in turns, with the Fisher information where a method needs it."""

import json

import jax
import pytest

from benchmarks import on_chip
from benchmarks.on_chip import METHODS, main, table


def test_on_chip(tmp_path, monkeypatch, capsys):
    shapes = {"a": (32, 16), "b": (32, 16), "norm": (16,)}
    monkeypatch.setitem(on_chip.TREES, "toy", shapes)
    path = tmp_path / "new" / "results.json"
    argv = ["--output", str(path), "--trees", "toy", "--repeats"]
    with jax.numpy_dtype_promotion("standard"):  # Optax, of steps and decay rates
        main([*argv, "2"])
    results = json.loads(path.read_text())
    assert results["trees"]["toy"].keys() == set(METHODS)
    assert results["trees"]["toy"]["adamw"]["ratio"] == 1
    assert all(found["ms"] > 0 for found in results["trees"]["toy"].values())
    assert path.with_suffix(".md").read_text() == table(results)
    assert "| toy | keep |" in capsys.readouterr().out
    monkeypatch.setattr(on_chip, "_times", None)  # not timed again
    main([*argv, "2"])
    with pytest.raises(SystemExit, match="2"):
        main([*argv, "3"])
    assert "repeats 2 instead of 3; give another output" in capsys.readouterr().err
