"""A model from nothing, and the frontier of it: the suite for GPUs at toy size."""

import json

import numpy as np
import pytest

from benchmarks import forgetting, pretrain
from benchmarks.forgetting_methods import METHODS
from examples.llama.text.tokenizer import load_tokenizer

TOY = {
    "vocab-size": 300,
    "hidden-size": 16,
    "layers": 1,
    "heads": 2,
    "steps": 8,
    "batch-size": 8,
    "max-length": 48,
    "learning-rate": 1e-2,
    "dtype": "float32",
    "retained-kilobytes": 1,
}


def write_packages(root, count=60):
    rng = np.random.default_rng(0)
    root.mkdir()
    for i in range(count):
        lines = [f"value_{n} = {n} + {i}\n" for n in rng.integers(0, 99, size=30)]
        if i % 3:
            (root / f"lib{i}").mkdir()
            (root / f"lib{i}" / "module.py").write_text("".join(lines))
        else:
            (root / f"one{i}.py").write_text("".join(lines))
    (root / "broken.py").write_bytes(b"\xff")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "other.py").write_text("seen = 'elsewhere'")


def flags(tmp_path, **changes):
    values = TOY | {"sources": tmp_path / "lib", "output": tmp_path / "out"} | changes
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.mark.slow
def test_the_suite_for_gpus_end_to_end(tmp_path, capsys, monkeypatch):
    write_packages(tmp_path / "lib")
    pretrain.main(flags(tmp_path))
    out = tmp_path / "out"
    result = json.loads((out / "run" / "result.json").read_text())
    before, after = (result[x]["retain_loss"] for x in ("before", "after"))
    assert after < before - 0.1
    retained = (out / "retained.txt").read_text()
    lines = (out / "sources.jsonl").read_text().splitlines()
    records = [json.loads(line)["text"] for line in lines]
    assert len(retained) > 100 and not set(records) & set(retained.splitlines(True))
    assert all(record not in retained for record in records)
    assert "elsewhere" not in retained + "".join(records)
    tokenizer = load_tokenizer(out / "run" / "model")
    assert tokenizer.decode(tokenizer.encode(records[0])) == records[0]

    line = json.dumps({"question": "1 + 1?", "answer": "2 because"})
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        (tmp_path / name).write_text("\n".join([line] * 8))
    short = METHODS["self"]._replace(points=METHODS["self"].points[:1])
    monkeypatch.setitem(METHODS, "self", short)
    capsys.readouterr()
    arguments = ["--suite=gpu", "--data-dir", str(out), str(tmp_path)]
    arguments += ["--methods", "self", "--seeds=1", "--steps=2"]
    arguments += ["--batch-size=4", "--max-length=48"]
    forgetting.main([*arguments, f"--output={tmp_path / 'frontier.json'}"])
    assert "1 runs, up to 1 seeds" in capsys.readouterr().out
    results = json.loads((tmp_path / "frontier.json").read_text())
    assert results["settings"]["rate_scale"] == 0.1
    assert results["settings"]["dtype"] == "bfloat16"


def test_goes_on_or_refuses(tmp_path, capsys, monkeypatch):
    write_packages(tmp_path / "lib")

    def stop(config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(flags(tmp_path))
    start = tmp_path / "out" / "start" / "config.json"
    written = start.stat().st_mtime_ns
    with pytest.raises(SystemExit):
        pretrain.main(flags(tmp_path, steps=9))
    message = "prepared.json: of other settings, steps 8 instead of 9;"
    assert message in capsys.readouterr().err
    pretrain.main(flags(tmp_path))
    assert start.stat().st_mtime_ns == written
    assert (tmp_path / "out" / "run" / "model" / "config.json").exists()


def test_no_sources(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(flags(tmp_path))
    assert "sources: 0 files to learn" in capsys.readouterr().err


def test_every_copy_comes_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    assert len(list(pretrain.sources([tmp_path]))) == 1


def test_pieces_are_whole_lines():
    text = "ab\ncd\n" + "e" * 9 + "\nf"
    pieces = list(pretrain.pieces_of(text, 6))
    assert pieces == ["ab\ncd\n", "e" * 9 + "\n", "f"]
    assert "".join(pieces) == text
