"""Runs that are killed or stopped, and resume as if nothing had happened."""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from examples.llama.training.loop import train
from tests.examples.llama.runs import (
    ROOT,
    config_of,
    finished,
    lines_of,
    metrics_of,
    start,
    tensors_of,
    wait_for,
    write_files,
)

STEPS = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files, and where all the processes keep what they compiled."""
    root = tmp_path_factory.mktemp("resume")
    return write_files(root), root / "cache"


def config(world, output, **changes):
    # A checkpoint at every other step, so that many kills fall into a save.
    options = {"steps": STEPS, "save_every": 2, "eval_every": 20, "alpha": 0.2}
    return config_of(world[0], output, **options | changes)


def run(world, output, code=0, **changes):
    return finished(start(config(world, output, **changes), world[1]), code)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run(world, output)
    return tensors_of(output / "model"), metrics_of(output)


def same_as(undisturbed, output, result="model"):
    tensors, metrics = undisturbed
    assert tensors_of(output / result) == tensors
    assert metrics_of(output) == metrics
    assert json.loads((output / "result.json").read_text())["after"] == {
        name: value for name, value in metrics[-1].items() if name != "step"
    }


def kill_until_done(world, output, moments):
    """Kills a run with SIGKILL at each of `moments`, then lets it end.

    A moment is a function of the process that returns when it has come. Returns the
    step from which it resumed last, and whether each kill left a half-written
    checkpoint.
    """
    halves = []
    for moment in moments:
        process = start(config(world, output), world[1])
        moment(process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (output / "result.json").exists()
        names = [path.name for path in (output / "checkpoints").iterdir()]
        halves.append(any("tmp" in name for name in names))
    out, _ = run(world, output)
    found = re.search(r"resuming from the checkpoint of step (\d+)", out)
    return int(found[1]), halves


@pytest.mark.slow
def test_killed_at_random_moments(world, undisturbed, tmp_path):
    """Kills at a random line of the metrics, the steps being some milliseconds."""
    output, rng = tmp_path / "run", random.Random(0)

    def moment(at):
        def wait(process):
            wait_for(lambda: lines_of(output) >= at, process)
            time.sleep(rng.random() * 0.03)

        return wait

    first, second = sorted(rng.sample(range(8, 50), 2))
    step, _ = kill_until_done(world, output, [moment(first), moment(second)])
    assert 0 < step < STEPS
    same_as(undisturbed, output)


def test_killed_during_a_save(world, undisturbed, tmp_path):
    output = tmp_path / "run"

    def saving(process):
        directory = output / "checkpoints"

        def half_written():
            names = [p.name for p in directory.iterdir()] if directory.exists() else []
            return lines_of(output) > 12 and any("tmp" in name for name in names)

        wait_for(half_written, process)

    # A save may be over before the signal arrives, but hardly three.
    step, halves = kill_until_done(world, output, [saving] * 3)
    assert any(halves) and 0 < step < STEPS
    same_as(undisturbed, output)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"lora_rank": 2, "lora_dropout": 0.2}], ids=["whole", "lora"]
)
def test_killed_with_importance(world, tmp_path, changes):
    """Before the first step, and on the way: texts and importance are kept as made.

    LoRA drops the same as if nothing had happened.
    """
    changes = {"method": "keep", "importance_texts": 8} | changes
    output, other = tmp_path / "run", tmp_path / "other"
    made = output / "importance.safetensors"
    kept = []
    for moment in (made.exists, lambda: lines_of(output) > 20):
        process = start(config(world, output, **changes), world[1])
        wait_for(moment, process)
        process.kill()
        process.communicate()
        kept.append((made.read_bytes(), made.stat().st_mtime_ns))
    out, _ = run(world, output, **changes)
    assert "resuming from the checkpoint of step" in out
    kept.append((made.read_bytes(), made.stat().st_mtime_ns))
    run(world, other, **changes)
    assert {content for content, _ in kept} == {
        (other / "importance.safetensors").read_bytes()
    }
    assert len({time for _, time in kept}) == 1
    result = "adapter" if "lora_rank" in changes else "model"
    same_as((tensors_of(other / result), metrics_of(other)), output, result)


@pytest.mark.slow
def test_killed_many_times(world, undisturbed, tmp_path):
    """At any time from the start of the process on, the export included."""
    rng, halves = random.Random(1), []
    for i in range(4):
        output = tmp_path / str(i)
        for _ in range(5):
            process = start(config(world, output), world[1])
            end = time.monotonic() + rng.uniform(3, 8)
            while time.monotonic() < end and process.poll() is None:
                time.sleep(0.01)
            process.kill()
            process.communicate()
            if (output / "result.json").exists():
                break
            directory = output / "checkpoints"
            names = [p.name for p in directory.iterdir()] if directory.exists() else []
            halves.append(any("tmp" in name for name in names))
        if not (output / "result.json").exists():
            run(world, output)
        same_as(undisturbed, output)
    assert len(halves) > 4


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal(world, undisturbed, tmp_path, number, code):
    """With hardly any checkpoints, so that the one of the signal counts.

    How many there are afterwards may change.
    """
    output = tmp_path / "run"
    process = start(config(world, output, save_every=1000), world[1])
    wait_for(lambda: lines_of(output) > 15, process)
    process.send_signal(number)
    _, err = finished(process, code)
    last = err.splitlines()[-1]
    found = re.fullmatch(
        rf"train: stopped by signal {number.value} after step (\d+); the same command "
        rf"resumes there; the last good checkpoint is (\S+)",
        last,
    )
    step = int(found[1])
    assert 10 < step < STEPS and found[2] == str(output / "checkpoints" / str(step))
    assert not (output / "model").exists()
    out, _ = run(world, output, save_every=25, keep=1)
    assert f"resuming from the checkpoint of step {step}\n" in out
    kept = [path.name for path in (output / "checkpoints").iterdir()]
    assert kept == [str(STEPS)]
    same_as(undisturbed, output)


@pytest.mark.slow
def test_goes_on_upon_another_mesh(world, undisturbed, tmp_path, capsys):
    """As on the first one, but for rounding."""
    output = tmp_path / "run"
    process = start(config(world, output, save_every=1000), world[1])
    wait_for(lambda: lines_of(output) > 15, process)
    process.send_signal(signal.SIGTERM)
    finished(process, 143)
    train(config(world, output, mesh="fsdp=2"))
    assert "resuming from the checkpoint of step" in capsys.readouterr().out
    for line, other in zip(metrics_of(output), undisturbed[1], strict=True):
        assert line == pytest.approx(other, rel=1e-3)


def test_other_settings_are_refused(world, tmp_path):
    output = tmp_path / "run"
    process = start(config(world, output), world[1])
    wait_for(lambda: lines_of(output) > 5, process)
    process.kill()
    process.communicate()
    with pytest.raises(
        ValueError, match=r"holds a run with learning_rate 0\.01, not 0"
    ):
        train(config(world, output, learning_rate=3e-3))
    assert lines_of(output) > 5


def test_two_processes_on_one_output(world, undisturbed, tmp_path):
    output = tmp_path / "run"
    process = start(config(world, output), world[1])
    wait_for(lambda: lines_of(output) > 5, process)
    _, err = run(world, output, code=2)
    where = f"{output}: process {process.pid} on {socket.gethostname()} is writing"
    assert err.startswith(f"train: {where}")
    finished(process)
    same_as(undisturbed, output)


def test_other_files_are_refused(world, tmp_path):
    """By their content; from another directory, and touched, they are the same."""
    files = write_files(tmp_path)
    output, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    shard = Path(files["data"][0]).rename(data / "part-1.jsonl")
    relative = {"data": (os.path.relpath(data, ROOT) + ":2",)}
    given = config_of(files | relative, output, save_every=2)
    process = start(dataclasses.replace(given, steps=STEPS), world[1])
    wait_for(lambda: lines_of(output) > 5, process)
    process.kill()
    process.communicate()
    given = dataclasses.replace(given, steps=STEPS, data=(f"{data}:2",))
    model, tokenizer = (files["model"] / x for x in ("config.json", "tokenizer.json"))
    for path in (shard, files["retain_data"], model, tokenizer):
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        with pytest.raises(ValueError, match=re.escape(f"{path}: has changed since")):
            train(given)
        path.write_bytes(before)
    shutil.copy(shard, data / "part-2.jsonl")
    with pytest.raises(ValueError, match=re.escape(f"{data}/part-2.jsonl: is new")):
        train(given)
    (data / "part-2.jsonl").unlink()
    out, _ = finished(start(given, world[1]))
    assert "resuming from the checkpoint" in out


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_without_its_metrics(world, undisturbed, tmp_path, damage):
    """The results do not depend on them, and a damaged line is named."""
    output = tmp_path / "run"
    process = start(config(world, output), world[1])
    wait_for(lambda: lines_of(output) > 30, process)
    process.kill()
    process.communicate()
    path = output / "metrics.jsonl"
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] + b"\n" + path.read_bytes()[130:])
        _, err = run(world, output, code=2)
        assert re.match(rf"train: {re.escape(str(path))}, line \d: ", err)
        path.write_bytes(b"")
    run(world, output)
    assert tensors_of(output / "model") == undisturbed[0]
    result = json.loads((output / "result.json").read_text())
    for name, line in (("before", undisturbed[1][0]), ("after", undisturbed[1][-1])):
        assert result[name] == {k: v for k, v in line.items() if k != "step"}


def test_a_damaged_checkpoint(world, undisturbed, tmp_path):
    output = tmp_path / "run"
    process = start(config(world, output), world[1])
    wait_for(lambda: lines_of(output) > 20, process)
    process.send_signal(signal.SIGTERM)
    finished(process, 143)
    steps = sorted(int(path.name) for path in (output / "checkpoints").iterdir())
    for path in (output / "checkpoints" / str(steps[-1]) / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-20])
    out, _ = run(world, output)
    assert f"warning: {output / 'checkpoints' / str(steps[-1])}: " in out
    assert f"resuming from the checkpoint of step {steps[-2]}\n" in out
    same_as(undisturbed, output)


def test_stray_files_of_a_dead_process(world, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    for name in (".config.json.4711", ".lock"):
        (output / name).write_text("{")
    run(world, output, steps=2)


@pytest.mark.slow
def test_a_disk_that_fills_up(world, tmp_path):
    """The system refuses to write; the run can resume from earlier checkpoints."""
    output = tmp_path / "run"
    process = start(config(world, output), world[1])
    wait_for(lambda: lines_of(output) > 15, process)
    limits = (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
    _, err = finished(process, 2)
    # Orbax's threads may write their tracebacks after it.
    said = re.search(r"^train: .*; the last good checkpoint is (\S+)/\d+", err, re.M)
    assert said and said[1] == str(output / "checkpoints"), err
    kept = [p.name for p in (output / "checkpoints").iterdir() if p.name.isdigit()]
    assert kept and not (output / "model").exists()
    out, _ = run(world, output)
    found = re.search(r"resuming from the checkpoint of step (\d+)", out)
    assert int(found[1]) == max(map(int, kept))
