"""The compiled programs' memory, on a head that compiles quickly."""

import json

from benchmarks import loss_memory
from benchmarks.loss_memory import Args, measure, table
from examples.llama.architectures import LlamaConfig

SMALL = LlamaConfig(
    vocab_size=60_000,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
)


def test_chunks_bound_the_memory(tmp_path, monkeypatch):
    monkeypatch.setitem(loss_memory.ARCHITECTURES, "small", SMALL)
    output = tmp_path / "memory.json"
    results = measure(Args(output=output, architecture="small", batch_sizes=(4, 16)))
    assert json.loads(output.read_text())["rows"] == results["rows"]
    few, many = results["rows"]
    assert many["logits_bytes"] == 4 * 16 * 1024 * 60_000
    assert many["plain_bytes"] > many["logits_bytes"] > 2 * many["chunked_bytes"]
    assert many["chunked_bytes"] < 1.2 * few["chunked_bytes"]
    assert "3,750" in table(results).splitlines()[2]
