"""The example of the real chat model, on a small one of random weights."""

import dataclasses
import json

import numpy as np
import pytest

from examples import smollm2
from examples.llama.checkpoints.gguf_export import save_gguf
from examples.llama.text.tokenizer import load_tokenizer
from tests.examples.llama.runs import CONFIG, random_model
from tests.examples.llama.text.tokenizer_files import CHATML_TEMPLATE, write_llama3


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """A GGUF file as the package has one."""
    root = tmp_path_factory.mktemp("package")
    write_llama3(root, chat_template=CHATML_TEMPLATE)
    config = dataclasses.replace(
        CONFIG, vocab_size=416, num_hidden_layers=1, max_position_embeddings=640
    )
    model = random_model(config, np.random.default_rng(0))
    save_gguf(model, load_tokenizer(root), root / "small.gguf", kind="F32")
    return root / "small.gguf"


def test_all_of_it(packaged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "smollm2_path", lambda: packaged)
    monkeypatch.setattr(smollm2, "HELD_OUT", 4)
    args = smollm2.Args(output=tmp_path / "run", records=8, max_length=512)
    results = smollm2.main(args)
    names = {"eval_loss", "retain_loss", "kl", "knowledge", "answers", "instructions"}
    assert names <= results["before"].keys() == results["after"].keys()
    assert results["after"]["eval_loss"] < results["before"]["eval_loss"]
    out = capsys.readouterr().out
    assert "converting small.gguf" in out
    assert out.count("> What is the capital of France?\n") == 2
    assert out.count("\nbefore: ") == out.count("\nafter:  ") == 3
    for name in ("report.html", "model/model.safetensors", "importance.safetensors"):
        assert (tmp_path / "run/keep" / name).exists()
    lines = (tmp_path / "run/train.jsonl").read_text().splitlines()
    assert len(lines) == 8 and json.loads(lines[0]).keys() == {"question", "answer"}
    with pytest.raises(ValueError, match="run/keep: holds a finished run; expected"):
        smollm2.main(args)


def test_errors(packaged, tmp_path, monkeypatch, capsys):
    output = f"--output={tmp_path}"

    def fail():
        raise ValueError("the package is not there")

    monkeypatch.setattr(smollm2, "smollm2_path", fail)
    for flags, message in [
        ([output], "the package is not there"),
        ([output, "--data=train.jsonl"], "data and eval_data must be given together"),
        ([output, "--records=0"], "records must be 1 or above, got 0"),
    ]:
        with pytest.raises(SystemExit) as error:
            smollm2.command(flags)
        assert error.value.code == 2
        assert capsys.readouterr().err.strip().endswith(f"smollm2: {message}")
    assert not [*tmp_path.iterdir()]
