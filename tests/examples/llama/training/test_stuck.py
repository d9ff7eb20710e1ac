"""A gradient whose square is infinite: what it stops, and what a run says of it."""

import shutil

import jax
import jax.numpy as jnp
import optax
import pytest

from examples.llama.training.loop import train
from examples.llama.training.optimizers import scale_by_given_learning_rate
from examples.llama.training.stuck import StuckEntries
from mofo_jax import scale_by_mofo
from tests.examples.llama.runs import config_of, metrics_of

RUN = {"steps": 8, "eval_every": 2, "save_every": 4, "keep": 9}
TOLD = "step 4: 1 of 6,384 entries cannot move any more: a gradient above 1.8e19 made"


def spike():
    """Makes one entry of the gradient 3e38 at step 3."""

    def update(updates, steps, params=None):
        leaves, treedef = jax.tree.flatten(updates)
        entry = (0,) * leaves[0].ndim
        changed = jnp.where(steps == 2, 3e38, leaves[0][entry])
        leaves[0] = leaves[0].at[entry].set(changed)
        return treedef.unflatten(leaves), steps + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


def optimizer_behind(*guard):
    def make(config):
        guarded = optax.chain(*guard, scale_by_mofo(config.alpha))
        finite = optax.apply_if_finite(guarded, 5)
        return optax.chain(spike(), finite, scale_by_given_learning_rate())

    return make


def stuck_in(output):
    """What each evaluation wrote."""
    lines = [line for line in metrics_of(output) if "loss" not in line]
    return {line["step"]: line.get("stuck_entries") for line in lines}


def test_told_once_and_written(files, tmp_path, capsys):
    """`apply_if_finite` lets the gradient through, and all losses are finite."""
    output = tmp_path / "run"
    config = config_of(files, output, **RUN, mesh="fsdp=2", report=True)
    result = train(config, optimizer=optimizer_behind())
    out = capsys.readouterr().out
    assert out.count(TOLD) == out.count("cannot move") == 1
    assert stuck_in(output) == {0: None, 2: None, 4: 1, 6: 1, 8: 1}
    assert result["stuck_entries"] == 1
    page = (output / "report.html").read_text()
    assert "second moment is infinite: 1. First seen at step 4." in page

    # As if it had been killed after the checkpoint of step 4.
    (output / "result.json").unlink()
    shutil.rmtree(output / "checkpoints" / "8")
    again = train(config, optimizer=optimizer_behind())
    out = capsys.readouterr().out
    assert "resuming from the checkpoint of step 4" in out
    assert out.count(TOLD) == out.count("cannot move") == 1
    assert stuck_in(output) == {0: None, 2: None, 4: 1, 6: 1, 8: 1}
    assert again["stuck_entries"] == 1 and again["after"] == result["after"]


def test_clipping_prevents_it(files, tmp_path, capsys):
    config = config_of(files, tmp_path / "run", **RUN)
    result = train(config, optimizer=optimizer_behind(optax.clip_by_global_norm(1.0)))
    assert "cannot move" not in capsys.readouterr().out
    assert set(stuck_in(config.output).values()) == {None}
    assert result["stuck_entries"] == 0


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_penalty_that_is_too_strong(files, tmp_path, clip_norm):
    """No loss and no norm of a gradient shows penalties, and so no error comes."""
    options = {"regularize": ("l2:1e30",), "clip_norm": clip_norm}
    config = config_of(files, tmp_path / "run", **RUN | options)
    result = train(config, progress=False)
    assert (result["stuck_entries"] > 0) == (clip_norm is None)


def test_an_optimizer_without_second_moments():
    state = optax.lion(0.1).init({"w": jnp.ones(3)})
    assert StuckEntries(print).look(1, state) == {}
