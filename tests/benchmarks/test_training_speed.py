"""The benchmark's command on a model that steps in milliseconds."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.training_speed import main, table
from benchmarks.training_step import SHAPES, batch_of, prompt_length
from examples.llama.model.llama import Llama
from tests.examples.llama.runs import CONFIG


def test_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", CONFIG)
    output = tmp_path / "new" / "speed.json"
    flags = ["--shapes", "tiny", "--length=16", "--repeats=2", "--no-torch"]
    main([f"--output={output}", *flags])
    results = json.loads(output.read_text())
    printed = capsys.readouterr()
    assert "tiny: 100%" in printed.err and table(results) in printed.out
    found = results["shapes"]["tiny"]
    assert found.keys() == {"adamw", "mofo"}
    assert found["adamw"]["time_over_our_adamw"] == 1
    for values in found.values():
        assert values["tokens_per_second"] > 0 and 0 < values["mfu"] < 1
    rows = table(results).splitlines()
    assert len(rows) == 3 and rows[2].split()[:2] == ["tiny", "mofo"]


@pytest.mark.parametrize(
    ("name", "count"), [("260K", 260_032), ("24M", 24_407_712), ("125M", 124_668_672)]
)
def test_shapes_are_named_after_their_sizes(name, count):
    model = nnx.eval_shape(lambda: Llama(SHAPES[name], rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(x.size for x in leaves) == count
    unit = 1e3 if name.endswith("K") else 1e6
    assert int(name[:-1]) == round(count / unit)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shapes", "15M"], "shapes must be among 260K, 24M, 125M, "),
        (["--dtype=float"], "dtype must be among float32, bfloat16, float16; got"),
        (["--param-dtype=int8"], "param_dtype must be among float32, "),
        (["--repeats=0"], "repeats must be 1 or above, got 0"),
        (["--output=x.txt"], "output must end in .json"),
    ],
)
def test_bad_arguments(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        main([f"--output={tmp_path / 'x.json'}", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("share", "length"), [(0.5, 8), (1.0, 1), (0.25, 12)])
def test_prompts(share, length):
    assert prompt_length(16, share) == length
    mask = batch_of(np.zeros((2, 16), np.int32), share)["loss_mask"]
    assert not mask[:, :length].any() and mask[:, length:].all()


@pytest.mark.parametrize(
    "name", ["training_speed", "training_speed_intel", "training_speed_smollm2"]
)
def test_published_results(name):
    """The guide quotes the numbers of the files."""
    root = Path(__file__).parents[2]
    results = json.loads((root / f"docs/results/{name}.json").read_text())
    guide = (root / "docs/fine_tuning.md").read_text()
    for name, found in results["shapes"].items():
        cells = [f"{found[key]['tokens_per_second']:,.0f}" for key in found]
        for key in ("mofo", "torch"):
            cells.append(f"{found[key]['time_over_our_adamw']:.2f}")
        assert f"| {name} | {' | '.join(cells)} |" in guide
