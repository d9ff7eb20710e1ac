"""The landscape around a tiny model's weights."""

import json

import numpy as np
import pytest

from benchmarks.landscape import main
from tests.examples.llama.runs import write_files


@pytest.mark.slow
def test_lines_and_plane_meet(tmp_path):
    paths = write_files(tmp_path)
    paths["data"] = paths["data"][0]
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in paths.items()]
    flags += ["--steps=4", "--batch-size=4", "--max-length=48", "--eval-records=3"]
    flags += ["--points=5", "--grid=5", "--adamw-rate=0.02", "--mofo-rate=0.04"]
    output = tmp_path / "results" / "landscape.json"
    main([*flags, f"--output={output}"])
    results = json.loads(output.read_text())
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    lines, plane, ends = (results[name] for name in ("lines", "plane", "ends"))
    for measure in ("eval_loss", "retain_loss"):
        # Both lines begin at the pretrained weights, and learning leads downwards.
        at_start = [line[measure][1] for line in lines.values()]
        assert lines["adamw"]["places"][1] == 0 and lines["adamw"]["places"][3] == 1
        assert at_start[0] == pytest.approx(at_start[1], rel=1e-6)
        assert np.shape(plane[measure]) == (5, 5)
    for line in lines.values():
        assert line["eval_loss"][3] < line["eval_loss"][1]
    # x and y are -0.5, 0, 0.5, 1 and 1.5 times the larger distance.
    assert ends["adamw"][1] == 0 and plane["y"][3] == pytest.approx(ends["mofo"][1])
    assert plane["eval_loss"][1][1] == pytest.approx(lines["mofo"]["eval_loss"][1])
    if ends["adamw"][0] >= ends["mofo"][0]:
        assert plane["eval_loss"][1][3] == pytest.approx(
            lines["adamw"]["eval_loss"][3], rel=1e-5
        )
    else:
        assert plane["eval_loss"][3][3] == pytest.approx(
            lines["mofo"]["eval_loss"][3], rel=1e-5
        )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--grid=1", "grid must be 2 or above, got 1"),
        ("--output=x.txt", "output must end in .json"),
        ("--suite=tpu", "suite must be among"),
    ],
)
def test_bad_arguments(tmp_path, capsys, flag, message):
    with pytest.raises(SystemExit):
        main([f"--output={tmp_path / 'x.json'}", flag])
    assert message in capsys.readouterr().err
