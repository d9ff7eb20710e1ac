"""The trainer in two real processes, over the loopback, beside one process."""

import json
import re

import pytest

from examples.llama.fisher import main
from examples.llama.training.loop import train
from tests.examples.llama.runs import (
    config_of,
    finished,
    lines_of,
    metrics_of,
    start,
    tensors_of,
    wait_for,
    write_files,
)
from tests.processes import free_port

CHANGES = {"batch_size": 8, "accumulate": 2, "steps": 10, "alpha": 0.2, "save_every": 4}


def pair(files, output, cache, **changes):
    port = free_port()
    return [
        start(
            config_of(
                files,
                output,
                **CHANGES | changes,
                mesh="fsdp=2",
                distributed=True,
                coordinator=f"localhost:{port}",
                processes=2,
                process_id=rank,
            ),
            cache,
        )
        for rank in range(2)
    ]


def test_two_processes(tmp_path):
    files, cache = write_files(tmp_path), tmp_path / "cache"
    both = pair(files, tmp_path / "two", cache)
    train(config_of(files, tmp_path / "one", **CHANGES), progress=False)  # meanwhile
    outputs = [finished(process)[0] for process in both]
    assert "eval_loss" in outputs[0] and "eval_loss" not in outputs[1]
    facts = json.loads((tmp_path / "two" / "run.json").read_text())
    assert facts["processes"] == 2 and facts["mesh"]["fsdp"] == 2
    found, expected = (metrics_of(tmp_path / name) for name in ("two", "one"))
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=2e-4, abs=1e-6)
    models = [tensors_of(tmp_path / name / "model") for name in ("two", "one")]
    assert models[0].keys() == models[1].keys()
    assert [len(x) for x in models[0].values()] == [len(x) for x in models[1].values()]
    assert "resuming" not in outputs[0]


@pytest.mark.slow
def test_two_processes_with_a_fisher_file(tmp_path):
    files, cache = write_files(tmp_path), tmp_path / "cache"
    path = tmp_path / "fisher.safetensors"
    flags = [f"--model={files['model']}", f"--output={path}", "--dense"]
    main([*flags, "--texts=4", "--max-length=48", "--mesh=fsdp=1"])
    changes = {"method": "keep", "importance": str(path), "report": True}
    both = pair(files, tmp_path / "two", cache, **changes)
    config = config_of(files, tmp_path / "one", **CHANGES, **changes)
    train(config, progress=False)  # meanwhile
    for process in both:
        finished(process)
    found, expected = (metrics_of(tmp_path / name) for name in ("two", "one"))
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-6)
    report = (tmp_path / "two" / "report.html").read_text()
    assert "Where the metric holds still" in report


@pytest.mark.slow
def test_two_processes_refuse_what_one_has_to_make(tmp_path):
    files, cache = write_files(tmp_path), tmp_path / "cache"
    for process in pair(files, tmp_path / "two", cache, method="keep"):
        _, err = finished(process, 2)
        assert "importance self needs one process, or the importance.safe" in err
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_two_processes_stopped_and_going_on(tmp_path):
    """SIGTERM to one of them stops both after the same step."""
    files, cache = write_files(tmp_path), tmp_path / "cache"
    output = tmp_path / "run"
    changes = {"steps": 60, "save_every": 1000, "eval_every": 1000}
    both = pair(files, output, cache, **changes)
    wait_for(lambda: lines_of(output) >= 15, *both)
    both[1].terminate()
    errors = [finished(process, 143)[1] for process in both]
    steps = [re.search(r"signal 15 after step (\d+);", text)[1] for text in errors]
    assert steps[0] == steps[1]
    assert (output / "checkpoints" / steps[0]).is_dir()
    both = pair(files, output, cache, **changes)
    (out, _), _ = [finished(process, timeout=250) for process in both]
    assert f"resuming from the checkpoint of step {steps[0]}\n" in out
    assert (output / "model" / "model.safetensors").exists()
