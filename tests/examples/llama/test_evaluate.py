"""The command, on tasks in local files and with the real 260K model."""

import json
import math
import os
import re
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from examples.llama import evaluate
from examples.llama.checkpoints.adapter import save_adapter
from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.evaluation.evaluate import general_abilities
from examples.llama.model.generation import generate
from examples.llama.model.lora import add_lora, lora_layers, merge_lora
from examples.llama.text.tokenizer import load_tokenizer, save_tokenizer
from tests.examples.llama.evaluation.harness_tasks import write_tasks

UNSAFE = """
task: stories_code
tag: stories
unsafe_code: true
output_type: generate_until
doc_to_text: "{{before}}"
doc_to_target: "{{after}}"
generation_kwargs:
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""
UNSAFE_GROUP = "group: stories_unsafe\ntask: [stories_letter, {task: stories_code}]\n"


@pytest.fixture(scope="module")
def tasks(data_dir, tmp_path_factory):
    excerpt = (data_dir / "tinystories_excerpt.txt").read_text()
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, excerpt, code=UNSAFE)
    (folder / "unsafe.yaml").write_text(UNSAFE_GROUP)
    return folder


@pytest.fixture(scope="module")
def options(data_dir, tasks):
    model, tokenizer = str(data_dir / "stories260K.bin"), str(data_dir / "tok512.bin")
    fixed = ["--model", model, "--tokenizer", tokenizer, "--dtype", "float32"]
    return [*fixed, "--include-path", str(tasks)]


@pytest.fixture(scope="module")
def questions(tasks):
    lines = (tasks / "questions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer(data_dir):
    return load_tokenizer(data_dir / "tok512.bin", 512)


@pytest.fixture(scope="module")
def model(data_dir):
    return load_model(data_dir / "stories260K.bin")


@pytest.fixture(scope="module")
def log_likelihood(model):
    """Of up to 256 tokens, from one of them on."""
    forward = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0]))

    def compute(tokens, start):
        padded = np.zeros((1, 256), np.int32)
        padded[0, : len(tokens)] = tokens
        logs = np.asarray(forward(model, padded))
        places = range(start - 1, len(tokens) - 1)
        return logs[places, tokens[start:]].sum(dtype=np.float64)

    return compute


def run(options, tmp_path, *more):
    output = tmp_path / "results.json"
    evaluate.main([*options, *more, "--output", str(output)])
    assert os.listdir(tmp_path) == ["results.json"]  # nothing half-written
    return json.loads(output.read_text())


def test_choices_and_generations(
    options, questions, model, tokenizer, log_likelihood, tmp_path, capsys
):
    tasks = "stories_choice, stories_generation"
    results = run(options, tmp_path, "--tasks", tasks)
    right, right_by_byte = [], []
    for question in questions:
        before, choices = question["before"], question["choices"]
        start = 1 + len(tokenizer.encode(before))
        logs = [
            log_likelihood([1, *tokenizer.encode(f"{before} {choice}")], start)
            for choice in choices
        ]
        target = choices.index(question["after"])
        right.append(np.argmax(logs) == target)
        lengths = [len(choice.encode()) for choice in choices]
        right_by_byte.append(np.argmax(np.divide(logs, lengths)) == target)
    assert 0 < sum(right) < len(right)
    scores = results["results"]["stories_choice"]
    assert scores["acc,none"] == pytest.approx(np.mean(right))
    assert scores["acc_norm,none"] == pytest.approx(np.mean(right_by_byte))

    prompts = [[1, *tokenizer.encode(question["prompt"])] for question in questions]
    tokens = np.array([[0] * (40 - len(prompt)) + prompt for prompt in prompts])
    new = generate(model, tokens, mask=tokens > 0, max_new_tokens=60, eos_id=2)
    texts = [tokenizer.decode(row) for row in np.asarray(new).tolist()]
    exact = [
        re.split(r"[\n.]", text)[0] == question["answer"]
        for text, question in zip(texts, questions, strict=True)
    ]
    assert exact[0] and not all(exact)
    scores = results["results"]["stories_generation"]
    assert scores["exact_match,none"] == pytest.approx(np.mean(exact))

    assert results["arguments"]["tasks"] == tasks
    assert results["arguments"]["batch_size"] == 16
    assert results["packages"].keys() == {"jax", "flax", "optax", "lm_eval"}
    assert results["versions"]["stories_choice"] == 1.0
    out, err = capsys.readouterr()
    row = rf"\|stories_generation\|.*\|exact_match\|.*\|{np.mean(exact):.4f}\|"
    assert re.search(row, out.replace(" ", ""))
    assert "Log-likelihoods: 100%" in err and "Generations: 100%" in err


def test_perplexity_of_the_first_questions(
    options, questions, tokenizer, log_likelihood, tmp_path
):
    tasks = "stories_perplexity"
    results = run(options, tmp_path, "--tasks", tasks, "--limit", "2")
    assert results["n-samples"][tasks] == {"original": 12, "effective": 2}
    stories = [question["story"] for question in questions[:2]]
    # The start token counts too, after itself, as in the harness's other backends.
    total = sum(log_likelihood([1, 1, *tokenizer.encode(x)], 1) for x in stories)
    expected = math.exp(-total / sum(len(x.encode()) for x in stories))
    found = results["results"][tasks]["byte_perplexity,none"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_adapter(options, data_dir, tmp_path):
    """It counts as if it were merged."""
    model = load_model(data_dir / "stories260K.bin")
    add_lora(model, 3, 5.0, rngs=nnx.Rngs(0))
    for i, layer in enumerate(lora_layers(model).values()):
        b = layer.lora_b
        b[...] = 0.1 * jax.random.normal(jax.random.key(i), b.shape)
    save_adapter(model, tmp_path / "adapter", base="stories260K")
    merge_lora(model)
    save_hugging_face(model, tmp_path / "merged")
    tokenizer = ["--tokenizer", str(data_dir / "tok512.bin"), "--dtype", "float32"]
    found = []
    for flags in (
        [*options, "--adapter", str(tmp_path / "adapter")],
        ["--model", str(tmp_path / "merged"), *tokenizer, *options[-2:]],
        options,
    ):
        output = tmp_path / f"results{len(found)}"
        output.mkdir()
        tasks = ["--tasks", "stories_perplexity", "--limit", "2"]
        results = run(flags, output, *tasks)["results"]
        found.append(results["stories_perplexity"]["byte_perplexity,none"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != pytest.approx(found[2], rel=1e-2)


def test_group_with_examples_and_the_models_own_tokenizer(
    model, tokenizer, tasks, tmp_path, capsys
):
    folder = tmp_path / "model"
    save_hugging_face(model, folder)
    save_tokenizer(tokenizer, folder)
    options = ["--model", str(folder), "--include-path", str(tasks)]
    more = ["--num-fewshot", "2", "--mesh", "tensor=2", "--batch-size", "5"]
    (tmp_path / "results").mkdir()
    results = run(options, tmp_path / "results", "--tasks", "stories_group", *more)
    assert results["n-shot"]["stories_choice"] == 2
    (scores,) = results["groups"].values()
    parts = [
        results["results"][f"stories_{x}"]["acc,none"] for x in ("choice", "letter")
    ]
    assert scores["acc,none"] == pytest.approx(np.mean(parts))
    assert "|stories_group" in capsys.readouterr().out


def test_tasks_that_run_code(options, capsys, tmp_path, monkeypatch):
    for tasks in ("stories_code", "stories_unsafe", "stories"):
        with pytest.raises(SystemExit) as caught:
            evaluate.main([*options, "--tasks", f"stories_letter,{tasks}"])
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and out == "" and err.count("\n") == 1
        assert err.startswith("evaluate: tasks: stories_code runs programs that the ")
        assert "--allow-code-execution" in err
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")  # and restored
    more = ["--tasks", "stories_code", "--allow-code-execution", "--limit", "1"]
    assert "stories_code" in run(options, tmp_path, *more)["results"]
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


@pytest.mark.slow  # the harness reads all of its files
def test_papers_tasks(options, capsys):
    """The harness has all of them, and HumanEval is what runs code."""
    with pytest.raises(SystemExit):
        evaluate.main(options)
    assert "tasks: humaneval runs programs" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        evaluate.main([*options, "--tasks", "paper,helaswag"])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1
    assert "'helaswag'; close to it are hellaswag" in err


def test_knowledge_without_tasks(options, tmp_path, capsys):
    items = tmp_path / "items.jsonl"
    lines = [
        {"prompt": "Once upon a", "choices": ["time", "house"], "answer": "time"},
        {"prompt": "Once upon a", "choices": ["time", "big"], "answer": "big"},
        {
            "question": "Who was happy?",
            "choices": ["Lily", "Ottokar"],
            "answer": "Lily",
            "relation": "names",
        },
    ]
    items.write_text("\n".join(json.dumps(line) for line in lines))
    folder = tmp_path / "results"
    folder.mkdir()
    results = run(options, folder, "--knowledge", str(items))
    found = results["knowledge"]
    assert found["right"] == pytest.approx(2 / 3)
    assert found["relations"]["names"]["right"] == 1
    assert (found["source"], found["items"]) == ("items.jsonl", 3)
    assert found["answers"]["items"] == 1 and found["answers"]["right"] in (0, 1)
    assert "results" not in results and "instructions" not in results
    out, err = capsys.readouterr()
    assert "Knowledge, choices right: 66.7% (" in out and "Short answers: 100%" in err
    first = run(options, folder, "--knowledge", str(items), "--limit", "1")
    assert (first["knowledge"]["items"], first["knowledge"]["right"]) == (2, 1)
    with pytest.raises(SystemExit):
        evaluate.main([*options, "--instructions"])
    message = "evaluate: instructions need a tokenizer with a chat template"
    assert capsys.readouterr().err.splitlines()[-1] == message
    items.write_text("{}")
    with pytest.raises(SystemExit):
        evaluate.main([*options, "--knowledge", str(items)])
    assert "items.jsonl, line 1: " in capsys.readouterr().err


def test_general_abilities():
    results = {
        "mmlu": {"acc,none": 0.4, "acc_stderr,none": 0.01},
        "hellaswag": {"acc,none": 0.1, "acc_norm,none": 0.7},
        "arc_easy": {"acc,none": 0.1, "acc_norm,none": 0.6},
        "arc_challenge": {"acc,none": 0.1, "acc_norm,none": 0.2},
        "gsm8k": {"exact_match,strict-match": 0.9},
        "humaneval": {"pass@1,create_test": 0.3},
    }
    expected = {"commonsense": 0.5, "general_abilities": 0.4}
    found = general_abilities(results)
    assert found == pytest.approx(expected)
    del results["humaneval"]
    found = general_abilities(results)
    assert found == pytest.approx({"commonsense": 0.5})
    del results["arc_easy"]
    assert general_abilities(results) == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "absent"], "No such file or directory: 'absent'"),
        (["--tokenizer", "absent"], "No such file or directory: 'absent'"),
        (["--seed", "-1"], "seed must be 0 to 4294967295, got -1"),
        (["--batch-size", "0"], "batch_size must be 1 or above, got 0"),
        (["--limit", "0"], "limit must be 1 or above, got 0"),
        (["--num-fewshot", "-1"], "num_fewshot must be 0 or above, got -1"),
        (["--max-length", "513"], "max_length must be 2 to 512, got 513"),
        (["--max-length", "60"], "max_gen_toks must be 1 to 59"),
        (["--mesh", "tensor=9"], "mesh 'tensor=9' has 9 devices, found 8"),
        (["--include-path", "absent"], "include_path must be a directory, got absent"),
        (["--output", "absent/x.json"], "output: cannot write a file absent/x.json"),
        (["--output", "."], "output: cannot write a file ."),
        (["--apply-chat-template"], "the tokenizer has no chat template"),
    ],
)
def test_errors(options, more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        evaluate.main([*options, "--tasks", "stories_generation", *more])
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]  # after progress bars
    assert caught.value.code == 2 and out == ""
    assert last.startswith("evaluate: ") and message in last
    assert not any(tmp_path.iterdir())


def test_a_broken_data_set(options, data_dir, tmp_path, capsys):
    write_tasks(tmp_path, (data_dir / "tinystories_excerpt.txt").read_text())
    (tmp_path / "questions.jsonl").write_text('{"before": \n')
    folder = ["--include-path", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        evaluate.main([*options, *folder, "--tasks", "stories_choice"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    start = (
        "evaluate: tasks: An error occurred while generating the dataset of stories_"
    )
    assert last.startswith(start) and "JSON parse error: Invalid value" in last


def test_help_without_the_harness(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.utils", None)
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--help"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1
    assert err.endswith("; pip install '.[evaluate]' brings it\n")
