"""The benchmark's report says what its numbers say, and its runs are real ones."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import gsm8k
from benchmarks.gsm8k import main, report, same_learning_rate, same_loss
from examples.llama.config import Config
from examples.llama.huggingface import save_hugging_face
from examples.llama.model import Llama
from examples.llama.train import train
from tests.examples.llama.llama2c_files import BASE, write_tokenizer
from tests.examples.llama.training import CONFIG

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "gsm8k_stories260k.json"


def run_of(method, alpha, learning_rate, eval_loss, retain_loss):
    return {
        "method": method,
        "alpha": alpha,
        "learning_rate": learning_rate,
        "before": {"eval_loss": 6.0, "retain_loss": 1.0, "kl": 0.0, "distance": 0.0},
        "after": {
            "eval_loss": eval_loss,
            "retain_loss": retain_loss,
            "kl": 0.25,
            "distance": 2.5,
        },
    }


ADAMW = [
    run_of("adamw", None, 1e-3, eval_loss=2.0, retain_loss=1.8),
    run_of("adamw", None, 3e-4, eval_loss=3.0, retain_loss=1.4),
]


def test_same_learning_rate():
    less = run_of("mofo", 0.1, 1e-3, eval_loss=2.5, retain_loss=1.25)
    more = run_of("mofo", 0.05, 3e-4, eval_loss=3.5, retain_loss=1.75)
    other = run_of("mofo", 0.1, 3e-3, eval_loss=1.9, retain_loss=1.0)
    text = same_learning_rate([*ADAMW, less, other])
    assert text.startswith("At the same learning rate, MoFO forgets less in every com")
    assert text.count("\n- ") == 1
    assert "\n- MoFO 10%, 1e-3: +0.250 nats per token" in text
    assert "with AdamW +0.800; held-out loss 2.500, with AdamW 2.000." in text
    text = same_learning_rate([more, *ADAMW])
    assert "MoFO forgets less in no comparison:\n" in text
    assert "- MoFO 5%, 3e-4: +0.750" in text and "with AdamW +0.400" in text
    text = same_learning_rate([more, *ADAMW, less])
    assert "MoFO forgets less in 1 of 2 comparisons, not consistently:\n" in text
    assert "MoFO cannot be compared:" in same_learning_rate([*ADAMW, other])


def test_same_loss():
    less = run_of("mofo", 0.1, 1e-3, eval_loss=2.04, retain_loss=1.79)
    more = run_of("mofo", 0.05, 1e-3, eval_loss=2.96, retain_loss=1.41)
    far = run_of("mofo", 0.1, 3e-3, eval_loss=2.4, retain_loss=1.0)
    text = same_loss([less, *ADAMW])
    assert "MoFO forgets less in every comparison:\n" in text
    assert text.endswith(
        "\n- MoFO 10%, 1e-3: +0.790 at a held-out loss of 2.040; AdamW, 1e-3: +0.800 "
        "at 2.000."
    )
    text = same_loss([*ADAMW, more, far])
    assert "MoFO forgets less in no comparison:\n" in text
    assert (
        "\n- MoFO 5%, 1e-3: +0.410 at a held-out loss of 2.960; AdamW, 3e-4: " in text
    )
    assert "AdamW, 3e-4: +0.400 at 3.000." in text
    assert text.endswith("AdamW, 1e-3: +0.800 at 2.000, the nearest, which is too far "
                         "to compare.")  # fmt: skip
    text = same_loss([more, less, *ADAMW])
    assert "MoFO forgets less in 1 of 2 comparisons, not consistently:\n" in text
    assert "MoFO cannot be compared:\n" in same_loss([*ADAMW, far])


def table_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table():
    runs = [
        *ADAMW,
        run_of("mofo", 0.05, 1e-3, eval_loss=2.5, retain_loss=0.9),
        run_of("mofo", 0.1, 3e-3, eval_loss=2.2, retain_loss=1.6),
        run_of("mofo", 0.1, 1e-3, eval_loss=2.4, retain_loss=1.2),
    ]
    settings = {"steps": 9, "batch_size": 2, "max_length": 8, "seed": 0}
    text = report(
        {
            "settings": settings,
            "device": "abacus",
            "versions": {"jax": "0"},
            "runs": runs,
        }
    )
    header, rule, before, *rows = table_of(text)
    assert len(header) == len(rule) == len(before) == 7
    assert before[1:4] == ["pretrained", "6.000", "1.000"]
    assert [row[:2] for row in rows] == [
        ["3e-4", "AdamW"],
        ["1e-3", "AdamW"],
        ["1e-3", "MoFO 10%"],
        ["1e-3", "MoFO 5%"],
        ["3e-3", "MoFO 10%"],
    ]
    assert rows[3][2:] == ["2.500", "0.900", "-0.100", "0.250", "2.50"]
    assert "9 steps of 2 records, up to 8 tokens" in text and "jax 0, on abacus" in text
    assert same_learning_rate(runs) in text and same_loss(runs) in text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory as the benchmark reads it, with a tiny model in place of the real."""
    root = tmp_path_factory.mktemp("data")
    write_tokenizer(root / "tok512.bin", ["<unk>", *BASE, " "])
    # A directory of safetensors is read wherever a file of llama2.c is.
    model = jax.jit(lambda: nnx.state(Llama(CONFIG, rngs=nnx.Rngs(0))))()
    graph = nnx.graphdef(nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0))))
    save_hugging_face(nnx.merge(graph, model), root / "stories260K.bin")
    for part in ("train", "test"):
        lines = [json.dumps({"question": "?", "answer": c * 5}) + "\n" for c in "abcde"]
        (root / f"gsm8k_{part}.jsonl").write_text("".join(lines))
    (root / "tinystories_excerpt.txt").write_text("once upon a time. " * 9)
    return root


@pytest.mark.slow
def test_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gsm8k, "RUNS", (("adamw", None, 3e-3), ("mofo", 0.2, 3e-3)))
    output = tmp_path / "deep" / "small.json"
    options = ["--steps", "4", "--batch-size", "2", "--max-length", "32", "--seed", "3"]
    main(["--output", str(output), "--data", str(data), *options])
    out, err = capsys.readouterr()
    assert "MoFO 20%, 3e-3: 100%" in err and "| 2/2 [" in err
    results = json.loads(output.read_text())
    table = output.with_suffix(".md").read_text()
    assert out == table + "\n" and table == report(results)
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "small.json",
        "small.md",
    ]
    assert results["versions"].keys() == {"jax", "optax", "flax"}
    assert {"steps": 4, "seed": 3, "model": "stories260K.bin"}.items() <= (
        results["settings"].items()
    )
    adamw, mofo = results["runs"]
    assert (adamw["method"], adamw["alpha"], adamw["learning_rate"]) == (
        *("adamw", None, 3e-3),
    )
    assert (mofo["method"], mofo["alpha"], mofo["learning_rate"]) == ("mofo", 0.2, 3e-3)
    assert adamw["before"] == mofo["before"]
    for run in (adamw, mofo):
        assert run["after"]["eval_loss"] < run["before"]["eval_loss"]
    assert mofo["after"]["distance"] < adamw["after"]["distance"]
    # They are the trainer's own numbers.
    config = Config(
        model=data / "stories260K.bin",
        tokenizer=data / "tok512.bin",
        data=(str(data / "gsm8k_train.jsonl"),),
        eval_data=str(data / "gsm8k_test.jsonl"),
        retain_data=data / "tinystories_excerpt.txt",
        output=tmp_path / "run",
        method="adamw",
        learning_rate=3e-3,
        mesh="fsdp=1",
        **{"steps": 4, "batch_size": 2, "max_length": 32, "seed": 3},
    )
    assert train(config, progress=False)["after"] == adamw["after"]

    # Started again, it trains what is missing and nothing else.
    trained = []

    def count(config, **kwargs):
        trained.append(config.alpha)
        return train(config, **kwargs)

    monkeypatch.setattr(gsm8k, "train", count)
    monkeypatch.setattr(gsm8k, "RUNS", (*gsm8k.RUNS, ("mofo", 0.5, 3e-3)))
    main(["--output", str(output), "--data", str(data), *options])
    assert trained == [0.5]
    again = json.loads(output.read_text())
    assert again["runs"][:2] == results["runs"] and len(again["runs"]) == 3
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(output), "--data", str(data), *options[:-1], "4"])
    assert "holds runs of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "absent"], "No such file or directory: 'absent/stories260K.bin'"),
        (["--steps", "0"], "steps must be 1 or above, got 0"),
        (["--output", "table.md"], "output must be a JSON file, got table.md"),
        (["--output", "."], "output must be a JSON file, got ."),
    ],
)
def test_errors(data, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["--output", "some.json", "--data", str(data), *options])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.splitlines()[-1].startswith("gsm8k: ") and message in err
    assert list(tmp_path.iterdir()) == []


def test_published_results():
    """The published table is the one that the published numbers make."""
    results = json.loads(RESULTS.read_text())
    assert RESULTS.with_suffix(".md").read_text() == report(results)
    found = [
        (run["method"], run["alpha"], run["learning_rate"]) for run in results["runs"]
    ]
    assert found == list(gsm8k.RUNS)
    settings = results["settings"]
    assert (settings["steps"], settings["batch_size"]) == (400, 16)
    assert settings["max_length"] == 256
    assert len({json.dumps(run["before"]) for run in results["runs"]}) == 1
    numbers = [run["after"]["eval_loss"] for run in results["runs"]]
    assert np.isfinite(numbers).all() and len(set(numbers)) == len(gsm8k.RUNS)
    # The README quotes the table as it is.
    table = [line for line in report(results).splitlines() if line.startswith("|")]
    assert "\n".join(table) in (RESULTS.parents[2] / "README.md").read_text()
    # Nothing of the machine that it ran on.
    assert not re.search(r"/(home|root|work|tmp|mnt)\b", RESULTS.read_text())
