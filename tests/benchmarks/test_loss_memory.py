"""The compiled programs' memory, on a head that compiles quickly."""

import json

import pytest

from benchmarks import loss_memory
from benchmarks.loss_memory import main, table
from examples.llama.model.architectures import LlamaConfig

SMALL = LlamaConfig(
    vocab_size=60_000,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
)


def test_chunks_bound_the_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(loss_memory.ARCHITECTURES, "small", SMALL)
    output = tmp_path / "new" / "memory.json"
    main([f"--output={output}", "--architecture=small", "--batch-sizes", "4", "16"])
    results = json.loads(output.read_text())
    assert table(results) in capsys.readouterr().out
    few, many = results["rows"]
    assert many["logits_bytes"] == 4 * 16 * 1024 * 60_000
    assert many["plain_bytes"] > many["logits_bytes"] > 2 * many["chunked_bytes"]
    assert many["chunked_bytes"] < 1.2 * few["chunked_bytes"]
    assert "3,750" in table(results).splitlines()[2]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--architecture=gpt2", "architecture must be among smollm2-135m, llama2-7b"),
        ("--output=x.txt", "output must end in .json"),
    ],
)
def test_bad_arguments(tmp_path, capsys, flag, message):
    with pytest.raises(SystemExit, match="2"):
        main([f"--output={tmp_path / 'x.json'}", flag])
    assert message in capsys.readouterr().err
