"""Runs on one task after another, and the scores of all tasks after each."""

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from examples import terminal
from examples.checks import check_least, check_name
from examples.files import locked, read_json_object, write_json, write_json_lines
from examples.llama.checkpoints.loading import load_model
from examples.llama.evaluation.answers import answer
from examples.llama.evaluation.task_metrics import METRICS
from examples.llama.reporting.task_scores import draw
from examples.llama.text.records import Message, Record, read_records
from examples.llama.text.tokenizer import load_tokenizer, tokenizer_path
from examples.llama.training.checks import check
from examples.llama.training.config import Config
from examples.llama.training.loop import train
from examples.llama.training.parsing import parse
from examples.llama.training.setup import check_length
from mofo_jax.continual import (
    backward_transfer,
    forward_transfer,
    overall_performance,
)

PROGRAM = "python -m examples.llama.continual"
FILES = ("train.json", "eval.json", "test.json")
# In the order of TRACE, with its epochs and metrics.
TRACE = {
    "C-STANCE": (5.0, "exact_match"),
    "FOMC": (3.0, "exact_match"),
    "MeetingBank": (7.0, "rouge_l"),
    "Py150": (5.0, "edit_similarity"),
    "ScienceQA": (3.0, "first_letter"),
    "NumGLUE-cm": (5.0, "exact_match"),
    "NumGLUE-ds": (5.0, "exact_match"),
    "20Minuten": (7.0, "sari"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """Directory of the tasks' runs, scores.json and scores.png."""
    tasks: tuple[Path, ...] = ()
    """Directories of the tasks, in their order."""
    trace: Path | None = None
    """The directory of TRACE's tasks, instead."""
    task_epochs: tuple[float, ...] = (1.0,)
    """Passes over each task's records, or over all tasks' where there is one number;
    TRACE has its own."""
    metrics: tuple[str, ...] = ("exact_match",)
    """The metric of each task, or one for all: exact_match, first_letter, rouge_l,
    edit_similarity or sari. TRACE has its own."""
    replay_earlier: float = 0.0
    """Share of each earlier task's records to see again, 0.1 say."""
    ewc_earlier: float = 0.0
    """Strength of a penalty on the distance from the model that a task begins with,
    weighted by the Fisher information of all earlier tasks' records (EWC); TRACE's own
    code has 400."""
    gem_earlier: bool = False
    """Hold every step back from what raises an earlier task's loss (GEM)."""
    test_records: int | None = None
    """How many records of each test to answer, the first ones; by default all."""
    max_new_tokens: int = 128
    """The longest answer."""


class Task(NamedTuple):
    path: Path
    epochs: float
    metric: str

    @property
    def name(self) -> str:
        return self.path.name


def tasks_of(args: Args) -> list[Task]:
    """The tasks, in order.

    Raises:
      ValueError: There are none, or two of a name; a number is bad; a task or one of
        its files is missing.
    """
    if bool(args.tasks) == (args.trace is not None):
        raise ValueError("give one of tasks and trace")
    paths, epochs, metrics = list(args.tasks), args.task_epochs, args.metrics
    if args.trace is not None:
        paths = [args.trace / name for name in TRACE]
        epochs, metrics = zip(*TRACE.values(), strict=True)
    for name, values in (("task_epochs", epochs), ("metrics", metrics)):
        if len(values) not in (1, len(paths)):
            raise ValueError(
                f"{name} must be one or {len(paths)}, as the tasks are, got {values}"
            )
    for metric in metrics:
        check_name("metrics", metric, METRICS)
    if not all(x > 0 for x in epochs):
        raise ValueError(f"task_epochs must be above 0, got {epochs}")
    if not 0 <= args.replay_earlier <= 1:
        raise ValueError(f"replay_earlier must be 0 to 1, got {args.replay_earlier}")
    if not 0 <= args.ewc_earlier < math.inf:
        raise ValueError(f"ewc_earlier must be 0 or above, got {args.ewc_earlier}")
    check_least("test_records", args.test_records, 1)
    check_least("max_new_tokens", args.max_new_tokens, 1)
    missing = [p / f for p in paths for f in FILES if not (p / f).is_file()]
    if missing:
        of = ", ".join(sorted({path.parent.name for path in missing}))
        raise ValueError(f"of the tasks {of} there is no {missing[0]}")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks must have names of their own, got {', '.join(names)}")
    if len(epochs) == 1:
        epochs *= len(paths)
    if len(metrics) == 1:
        metrics *= len(paths)
    return [Task(*task) for task in zip(paths, epochs, metrics, strict=True)]


def run(args: Args, flags: Sequence[str], *, progress: bool = True) -> dict[str, Any]:
    """Trains on all tasks and scores all after each, from where a run before ended.

    Args:
      args: The tasks.
      flags: Of examples.llama.train, but for those that the tasks give.
      progress: Whether to show bars.

    Returns:
      What scores.json has: "tasks" and "metrics"; "before", the scores of the
      pretrained model; "scores", R[t][i], the score on task i after task t; and when it
      is complete "op", "bwt" and "fwt".

    Raises:
      ValueError, OSError, FloatingPointError, terminal.Stopped: See `loop.train`.
    """
    tasks = tasks_of(args)
    start = task_config(args, flags, tasks, 0)
    check(start)
    if start.distributed:
        raise ValueError("distributed is not for continual, which is one process")
    with locked(args.output):
        return _run(args, flags, tasks, start, progress)


def _run(
    args: Args,
    flags: Sequence[str],
    tasks: list[Task],
    start: Config,
    progress: bool,
) -> dict[str, Any]:
    """See `run`; `start` is the first task's configuration."""
    path = args.output / "scores.json"
    fixed = {
        "tasks": [task.name for task in tasks],
        "metrics": [task.metric for task in tasks],
        "test_records": args.test_records,
        "max_new_tokens": args.max_new_tokens,
    }
    results: dict[str, Any] = fixed | {"before": None, "scores": []}
    if path.exists():
        results = _scored(path, fixed)
    if results["before"] is None:
        results["before"] = _scores(args, start, start.model, tasks, progress)
        write_json(path, results)
    for t in range(len(results["scores"]), len(tasks)):
        config = task_config(args, flags, tasks, t)
        if not (config.output / "result.json").exists():
            if progress:
                tqdm.write(f"task {t + 1} of {len(tasks)}: {tasks[t].name}")
            train(config, progress=progress)
        model = config.output / "model"
        results["scores"].append(_scores(args, config, model, tasks, progress))
        if t == len(tasks) - 1:
            results |= summary(results)
        write_json(path, results)
    draw(results, args.output / "scores.png")
    return results


def _scored(path: Path, fixed: dict[str, Any]) -> dict[str, Any]:
    """The scores so far; ValueError unless they are of the same run."""
    results = read_json_object(path)
    for name, value in fixed.items():
        if (found := results.get(name)) != value:
            raise ValueError(
                f"{path}: holds scores of {name} {found}, not {value}; give another "
                "output"
            )
    if not results.keys() >= {"before", "scores"}:
        raise ValueError(f"{path}: expected before and scores")
    return results


def summary(results: dict[str, Any]) -> dict[str, float]:
    """OP; and of two tasks or more BWT and FWT."""
    scores = results["scores"]
    found = {"op": overall_performance(scores)}
    if len(scores) > 1:
        found["bwt"] = backward_transfer(scores)
        found["fwt"] = forward_transfer(scores, results["before"])
    return found


def task_config(args: Args, flags: Sequence[str], tasks: list[Task], t: int) -> Config:
    """The configuration for task t, which starts from the model of the task before."""
    task, own = tasks[t], []
    for flag in ("--data", "--eval-data", "--epochs", "--steps", "--output"):
        if any(x == flag or x.startswith(f"{flag}=") for x in flags):
            raise ValueError(f"{flag} is what the tasks give; leave it out")
    own += [f"--data={task.path / 'train.json'}", f"--epochs={task.epochs}"]
    own += [f"--eval-data={task.path / 'eval.json'}"]
    own += [f"--output={_output(args, tasks, t)}"]
    config = parse([*flags, *own], PROGRAM, "")
    changes: dict[str, Any] = {
        # What is drawn is drawn anew for each task, half fine-tuning's half too.
        "seed": config.seed + t,
        "tokenizer": tokenizer_path(config.tokenizer, config.model),
        "lora_merge": config.lora_rank > 0,  # the next task begins at the whole model
    }
    if t:
        changes["model"] = _output(args, tasks, t - 1) / "model"
    if args.gem_earlier:
        earlier = [str(other.path / "train.json") for other in tasks[:t]]
        changes["gem"] = (*config.gem, *earlier)
    if args.ewc_earlier and t:
        if config.fisher_data:
            raise ValueError("ewc_earlier gives --fisher-data; leave that out")
        changes["regularize"] = (*config.regularize, f"ewc:{args.ewc_earlier}")
        changes["fisher_data"] = str(_all_earlier(args, tasks[:t]))
    if args.replay_earlier and t:
        own_count = len(_records(task, "train.json"))
        replay = list(config.replay)
        for other in tasks[:t]:
            path, count = _share(args, other, config.seed)
            replay.append(f"{path}:{count / own_count}")
        changes["replay"] = tuple(replay)
    return dataclasses.replace(config, **changes)


def _output(args: Args, tasks: list[Task], t: int) -> Path:
    return args.output / f"{t + 1}-{tasks[t].name}"


def _records(task: Task, file: str) -> list[Record]:
    return read_records(task.path / file).records


def _share(args: Args, task: Task, seed: int) -> tuple[Path, int]:
    """A file of the share of an earlier task's records that is kept, and how many."""
    records = _records(task, "train.json")
    count = max(1, round(args.replay_earlier * len(records)))
    path = args.output / "replay" / f"{task.name}.jsonl"
    if not path.exists():
        chosen = sorted(random.Random(seed).sample(range(len(records)), count))
        _write(path, [records[i] for i in chosen])
    return path, count


def _all_earlier(args: Args, earlier: list[Task]) -> Path:
    """A file of earlier tasks' records in turns, as the Fisher takes the first ones."""
    path = args.output / "earlier" / f"{len(earlier)}.jsonl"
    if not path.exists():
        of_tasks = (_records(task, "train.json") for task in earlier)
        turns = itertools.chain(*itertools.zip_longest(*of_tasks))
        _write(path, [record for record in turns if record is not None])
    return path


def _write(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, (_line(record.content) for record in records))


def _line(content: tuple[Message, ...] | str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"text": content}
    return {"messages": [message._asdict() for message in content]}


def _scores(
    args: Args, config: Config, model: Path, tasks: list[Task], progress: bool
) -> list[float]:
    """The model's score on each task's test."""
    llama = load_model(model, dtype=config.dtype, param_dtype=config.param_dtype)
    check_length(config, llama)
    assert config.tokenizer is not None, "task_config fills it in"
    tokenizer = load_tokenizer(config.tokenizer, llama.config.vocab_size)
    found = []
    style = terminal.bar_style()
    for task in tqdm(tasks, desc="scoring", disable=not progress, **style):
        records = _records(task, "test.json")[: args.test_records]
        answers = answer(
            llama,
            tokenizer,
            records,
            template=config.template,
            max_length=config.max_length,
            max_new_tokens=args.max_new_tokens,
        )
        expected, questions = [], []
        for record in records:
            assert not isinstance(record.content, str), "answer refuses plain text"
            expected.append(record.content[-1].content)
            questions.append(record.content[-2].content)
        found.append(METRICS[task.metric](answers, expected, questions))
    return found
