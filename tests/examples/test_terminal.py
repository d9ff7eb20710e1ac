"""What a person sees of an error, and the exit code."""

import sys

import jax
import jax.numpy as jnp
import pytest

from examples import terminal


def fails(capsys, code, act):
    """The line on stderr."""
    with pytest.raises(SystemExit) as caught, terminal.errors_on_one_line("train"):
        act()
    out, err = capsys.readouterr()
    assert caught.value.code == code and out == "" and err.count("\n") == 1
    return err.removesuffix("\n")


def raising(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("alpha is odd"), 2, "train: alpha is odd"),
        (OSError("the disk is full"), 2, "train: the disk is full"),
        (ValueError("one\ntwo"), 2, "train: one two"),
        (FloatingPointError("loss is nan"), 1, "train: loss is nan"),
        (terminal.Stopped(15, "stopped"), 143, "train: stopped"),
    ],
)
def test_exit_codes(capsys, error, code, line):
    assert fails(capsys, code, raising(error)) == line


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("rapidfuzz", "evaluate"),
        ("rouge_score.rouge_scorer", "evaluate"),
        ("tqdm", "examples"),
    ],
)
def test_a_missing_package(capsys, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    line = fails(capsys, 2, lambda: __import__(module))
    assert line.startswith(f"train: import of {module} halted")
    assert line.endswith(f"; pip install '.[{extra}]' brings it")


def test_a_module_of_no_extra(capsys):
    line = fails(capsys, 2, lambda: __import__("absent_module"))
    assert line == "train: No module named 'absent_module'"


def test_out_of_memory(capsys):
    line = fails(capsys, 2, lambda: jnp.zeros(1 << 50, jnp.int8).block_until_ready())
    assert line.startswith("train: RESOURCE_EXHAUSTED: Out of memory")
    assert "--batch-size" in line and "--remat full" in line


@pytest.mark.parametrize("kind", [RuntimeError, jax.errors.JaxRuntimeError, KeyError])
def test_mistakes_of_ours_keep_their_traceback(kind):
    with pytest.raises(kind), terminal.errors_on_one_line("train"):
        raise kind("INTERNAL: of the compiler")
