"""Sequences of tasks, on a tiny model that can learn them entirely."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from examples.llama.checkpoints.loading import load_model
from examples.llama.continual import main
from examples.llama.evaluation.answers import answer
from examples.llama.model.generation import generate
from examples.llama.reporting.task_scores import table
from examples.llama.text.records import read_records
from examples.llama.text.tokenizer import load_tokenizer
from examples.llama.training import sequence
from examples.llama.training.sequence import Args, run, tasks_of
from tests.examples.llama.checkpoints.llama2c_files import BASE, write_tokenizer
from tests.examples.llama.runs import ROOT, lines_of, wait_for, write_files
from tests.processes import environment


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model and two tasks: to answer "x" always, and to answer "yy" always."""
    root = tmp_path_factory.mktemp("world")
    files = write_files(root)
    for name, text in (("first", "x"), ("second", "yy")):
        (root / name).mkdir()
        for file, count in (("train", 24), ("eval", 4), ("test", 6)):
            records = [
                {"prompt": f"{name[0]}{i}", "answer": text} for i in range(count)
            ]
            (root / name / f"{file}.json").write_text(json.dumps(records))
    return root, files["model"]


FLAGS = [
    "--learning-rate=2e-2", "--batch-size=8", "--max-length=48", "--samples=0",
    "--mesh=fsdp=1", "--method=adamw", "--eval-every=50", "--no-report",
]  # fmt: skip


def args_of(world, output, **changes):
    tasks = (world[0] / "first", world[0] / "second")
    settings = {"task_epochs": (20.0,), "max_new_tokens": 4}
    return Args(output=output, tasks=tasks, **settings | changes)


def flags_of(world):
    return [*FLAGS, f"--model={world[1]}"]


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("plain") / "run"
    return output, run(args_of(world, output), flags_of(world), progress=False)


def test_known_scores(plain):
    """Learning the second task without the first one ends what was learned of it."""
    output, results = plain
    assert results["before"] == [0, 0]
    assert results["scores"] == [[100, 0], [0, 100]]
    assert (results["op"], results["bwt"], results["fwt"]) == (50, -100, 0)
    assert json.loads((output / "scores.json").read_text()) == results
    assert (output / "scores.png").read_bytes().startswith(b"\x89PNG")
    rows = table(results).splitlines()
    assert rows[0].split() == ["first", "second"]
    assert rows[2].split() == ["first", "100.0", "0.0"]
    assert rows[-2].split() == ["BWT", "-100.00"]


def test_replay_keeps_the_first_task(world, tmp_path):
    args = args_of(world, tmp_path / "run", replay_earlier=0.5)
    results = run(args, flags_of(world), progress=False)
    assert results["scores"][1] == [100, 100]
    assert results["bwt"] == 0
    kept = (tmp_path / "run/replay/first.jsonl").read_text().splitlines()
    assert len(kept) == 12 and len(set(kept)) == 12
    config = json.loads((tmp_path / "run/2-second/config.json").read_text())
    assert config["replay"] == [f"{tmp_path / 'run/replay/first.jsonl'}:0.5"]
    assert config["model"] == str(tmp_path / "run/1-first/model")
    assert config["seed"] == 1


def test_a_finished_run_is_not_repeated(world, plain, monkeypatch):
    output, results = plain
    monkeypatch.setattr(sequence, "train", None)
    again = run(args_of(world, output), flags_of(world), progress=False)
    assert again == results
    with pytest.raises(ValueError, match=r"holds scores of max_new_tokens 4, not 5"):
        run(args_of(world, output, max_new_tokens=5), flags_of(world), progress=False)


def test_gem_and_seeds_of_each_task(world, tmp_path):
    args = args_of(world, tmp_path, gem_earlier=True)
    flags, tasks = [*flags_of(world), "--seed=5"], tasks_of(args)
    first, second = (sequence.task_config(args, flags, tasks, t) for t in range(2))
    assert (first.seed, second.seed) == (5, 6)
    assert (first.gem, second.gem) == ((), (str(world[0] / "first/train.json"),))
    assert first.epochs == 20 and second.eval_data == str(world[0] / "second/eval.json")
    # The second task begins at the whole model of the first.
    lora = sequence.task_config(args, [*flags, "--lora-rank=2"], tasks, 0)
    assert lora.lora_merge and not first.lora_merge


def test_ewc_on_what_all_earlier_tasks_need(world, tmp_path):
    tasks = (world[0] / "first", world[0] / "second", world[0] / "third")
    shutil.copytree(tasks[0], tasks[2], dirs_exist_ok=True)
    args = args_of(world, tmp_path, ewc_earlier=400.0)
    args = dataclasses.replace(args, tasks=tasks)
    flags, tasks = [*flags_of(world), "--regularize=l2:0.1"], tasks_of(args)
    first, _, third = (sequence.task_config(args, flags, tasks, t) for t in range(3))
    assert first.regularize == ("l2:0.1",) and first.fisher_data is None
    assert third.regularize == ("l2:0.1", "ewc:400.0")
    records = read_records(third.fisher_data).records
    assert len(records) == 48
    answers = [record.content[-1].content for record in records]
    assert answers[:4] == ["x", "yy", "x", "yy"]
    with pytest.raises(ValueError, match="ewc_earlier gives --fisher-data"):
        sequence.task_config(args, [*flags, "--fisher-data=self"], tasks, 1)


def test_answers(world):
    """Batched, padded and sorted, they are those that each question gets alone."""
    model, tokenizer = load_model(world[1]), load_tokenizer(world[1])
    records = read_records(world[0] / "data.jsonl").records
    settings = {"template": "paper", "max_length": 30, "max_new_tokens": 5}
    found = answer(model, tokenizer, records, **settings)
    assert len(found) == len(records) == 22
    for text, record in list(zip(found, records, strict=True))[::7]:
        question = f"<|user|>\n{record.content[0].content}\n<|assistant|>\n"
        prompt = [tokenizer.bos_id, *tokenizer.encode(question)][-30:]
        (ids,) = generate(
            model, np.array([prompt]), max_new_tokens=5, eos_id=tokenizer.eos_ids
        ).tolist()
        ends = [i for i, x in enumerate(ids) if x in tokenizer.eos_ids]
        assert text == tokenizer.decode(ids[: ends[0]] if ends else ids)


def write_real_tasks(root, data):
    """Sums worked out, and stories told on: a hundred records of each."""
    lines = (data / "gsm8k_train.jsonl").read_text().splitlines()[:100]
    pairs = [json.loads(line) for line in lines]
    sums = [{"prompt": x["question"][-80:], "answer": x["answer"]} for x in pairs]
    text = (data / "tinystories_excerpt.txt").read_text()
    starts = range(0, 100 * 240, 240)
    stories = [
        {"prompt": text[i : i + 80], "answer": text[i + 80 : i + 240]} for i in starts
    ]
    for name, records in (("sums", sums), ("stories", stories)):
        (root / name).mkdir()
        parts = {"train": records[:80], "eval": records[80:84], "test": records[84:]}
        for file, part in parts.items():
            (root / name / f"{file}.json").write_text(json.dumps(part))
    return root / "sums", root / "stories"


@pytest.mark.slow
def test_real_tasks(data_dir, tmp_path):
    """The pretrained model, which tells stories and has never seen a sum."""
    args = Args(
        output=tmp_path / "run",
        tasks=write_real_tasks(tmp_path, data_dir),
        task_epochs=(6.0, 2.0),
        metrics=("edit_similarity",),
        max_new_tokens=40,
    )
    flags = [f"--model={data_dir / 'stories260K.bin'}", "--method=mofo"]
    flags += [f"--tokenizer={data_dir / 'tok512.bin'}", "--max-length=160"]
    flags += ["--learning-rate=2e-3", "--batch-size=8", "--samples=0", "--mesh=fsdp=1"]
    results = run(args, flags, progress=False)
    before, (first, second) = results["before"], results["scores"]
    assert first[0] > before[0] + 0.5
    assert all(0 <= x <= 100 for x in (*before, *first, *second))
    assert results["bwt"] == pytest.approx(second[0] - first[0])
    assert results["fwt"] == pytest.approx(first[1] - before[1])
    assert results["op"] == pytest.approx(np.mean(second))


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_goes_on_after_a_kill(world, plain, tmp_path, inside):
    """Inside of the second task, and between the tasks."""
    output = tmp_path / "run"
    flags = [*flags_of(world), "--save-every=4"]
    command = [sys.executable, "-m", "examples.llama.continual", *flags]
    for task in args_of(world, output).tasks:
        command += ["--tasks", str(task)] if "--tasks" not in command else [str(task)]
    command += [f"--output={output}", "--task-epochs=20", "--max-new-tokens=4"]
    options = {"cwd": ROOT, "env": environment(), "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)

    def come():
        if not inside:
            return (output / "1-first/result.json").exists()
        return lines_of(output / "2-second") > 10

    wait_for(come, process, seconds=200)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "2-second/result.json").exists()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, **options)
    assert "BWT" in done.stdout.decode()
    results = json.loads((output / "scores.json").read_text())
    assert results["scores"] == plain[1]["scores"]


BAD = [
    ({"tasks": ()}, "give one of tasks and trace"),
    ({"task_epochs": (1.0, 2.0, 3.0)}, "task_epochs must be one or 2"),
    ({"task_epochs": (0.0,)}, "task_epochs must be above 0"),
    ({"metrics": ("bleu",)}, "metrics must be among exact_match, "),
    ({"replay_earlier": 2.0}, "replay_earlier must be 0 to 1, got 2.0"),
    ({"ewc_earlier": -1.0}, "ewc_earlier must be 0 or above, got -1.0"),
    ({"test_records": 0}, "test_records must be 1 or above, got 0"),
    ({"max_new_tokens": 0}, "max_new_tokens must be 1 or above, got 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arguments(world, tmp_path, changes, message):
    args = dataclasses.replace(args_of(world, tmp_path), **changes)
    with pytest.raises(ValueError) as caught:
        tasks_of(args)
    assert message in str(caught.value)


def test_missing_tasks(world, tmp_path, capsys):
    for name in list(sequence.TRACE)[2:]:
        (tmp_path / name).mkdir()
        for file in sequence.FILES:
            (tmp_path / name / file).write_text("[]")
    with pytest.raises(SystemExit) as caught:
        main([f"--trace={tmp_path}", f"--output={tmp_path / 'out'}", *flags_of(world)])
    assert caught.value.code == 2
    assert "of the tasks C-STANCE, FOMC there is no" in capsys.readouterr().err
    for name in ("C-STANCE", "FOMC"):
        (tmp_path / name).mkdir()
        for file in sequence.FILES:
            (tmp_path / name / file).write_text("[]")
    tasks = tasks_of(Args(output=tmp_path / "out", trace=tmp_path))
    assert [task.epochs for task in tasks] == [5, 3, 7, 5, 3, 5, 5, 7]
    assert tasks[-1].metric == "sari" and tasks[2].metric == "rouge_l"


def test_flags_of_the_tasks_own(world, tmp_path):
    with pytest.raises(ValueError, match="--steps is what the tasks give"):
        run(args_of(world, tmp_path), [*flags_of(world), "--steps=3"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha=0"], "alpha must be above 0 and up to 1, got 0.0"),
        (["--method=adagrad"], "method must be one of adamw, "),
        (["--max-length=65"], "max_length must be up to the model's 64, got 65"),
        (["--distributed"], "distributed is not for continual"),
        (["--tokenizer=tok.bin"], "tok.bin: 261 tokens, expected the model's vocab_si"),
        (["--model=tok.bin"], "tokenizer must be given, tok.bin is neither"),
    ],
)
def test_flags_are_checked_before_the_first_scores(
    world, tmp_path, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sequence, "answer", None)
    write_tokenizer(tmp_path / "tok.bin", ["<unk>", *BASE, " ", "a"])
    with pytest.raises(ValueError) as caught:
        run(args_of(world, tmp_path / "run"), [*flags_of(world), *flags])
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_damaged_scores(world, plain, tmp_path):
    scores = json.loads((plain[0] / "scores.json").read_text())
    del scores["before"]
    path = tmp_path / "scores.json"
    texts = {
        "{}": "holds scores of tasks None, not ['first', 'second']; give another",
        "{": "expected a JSON object",
        "[]": "list; expected a JSON object",
        json.dumps(scores): "expected before and scores",
    }
    for text, message in texts.items():
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            run(args_of(world, tmp_path), flags_of(world), progress=False)
        assert str(caught.value).startswith(f"{path}: ")
        assert message in str(caught.value)


def test_plain_text_is_seen_again(world, tmp_path):
    tasks = (tmp_path / "text", world[0] / "second")
    shutil.copytree(world[0] / "first", tasks[0])
    texts = [{"text": f"Number {i}."} for i in range(4)]
    (tasks[0] / "train.json").write_text(json.dumps(texts))
    args = args_of(world, tmp_path / "run", replay_earlier=1.0)
    args = dataclasses.replace(args, tasks=tasks)
    second = sequence.task_config(args, flags_of(world), tasks_of(args), 1)
    path, _, share = second.replay[0].rpartition(":")
    kept = [record.content for record in read_records(path).records]
    assert kept == [text["text"] for text in texts] and float(share) == 4 / 24
