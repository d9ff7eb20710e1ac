"""Tasks of lm-evaluation-harness, found, run on a model, and summed up."""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import lm_eval
import tyro
from datasets.exceptions import DatasetGenerationError
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from examples.checks import check_least, check_seed
from examples.environment import environment
from examples.llama.checkpoints.loading import check_finite, load_model
from examples.llama.evaluation.harness import JaxLM
from examples.llama.evaluation.probes import measure_instructions, measure_knowledge
from examples.llama.evaluation.probes import table as probes_table
from examples.llama.evaluation.questions import load_items
from examples.llama.model.llama import Llama
from examples.llama.model.sharding import make_mesh, parameter_sharding
from examples.llama.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_path

COMMONSENSE = ("hellaswag", "arc_easy", "arc_challenge")
PRESETS = {"paper": ("mmlu", *COMMONSENSE, "gsm8k", "humaneval")}
# The paper does not say which accuracy it takes. On ARC and HellaSwag the normalized
# one is usual. Its HumanEval is pass@10 of 20 samples; the harness's task is greedy.
GENERAL = dict.fromkeys(COMMONSENSE, "acc_norm,none") | {
    "mmlu": "acc,none",
    "humaneval": "pass@1,create_test",
}
# Of what the harness returns. The rest is about the machine.
KEPT = (
    *("results", "groups", "group_subtasks", "configs", "versions", "n-shot"),
    *("n-samples", "higher_is_better"),
)
BOOTSTRAPS = 1000  # resamplings, for the few metrics without a formula for the error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    model: Path
    """A Hugging Face directory (config.json, safetensors), GGUF or llama2.c file."""
    adapter: Path | None = None
    """Directory of a PEFT adapter to load with the model."""
    tokenizer: Path | None = None
    """A directory with tokenizer.json, or a llama2.c tokenizer; else the model's."""
    tasks: str | None = None
    """The harness's names of tasks or groups of them, separated by commas, or "paper".
    `lm_eval ls tasks` lists them. Default "paper", or none with one of the next two."""
    knowledge: Annotated[str | None, tyro.conf.arg(metavar="world|FILE")] = None
    """Questions on what the model knows, as choices and as short answers: world, those
    that packages make, or JSON lines of your own."""
    instructions: bool = False
    """Count which instructions the model obeys, in chat form."""
    include_path: Path | None = None
    """Directory with task files (YAML) of your own. They may name Python functions,
    which are run."""
    num_fewshot: int | None = None
    """Examples in front of each question, instead of the tasks' own numbers."""
    limit: int | None = None
    """Questions of each task or kind of knowledge, the first ones; all by default."""
    apply_chat_template: bool = False
    """Ask in the form of a conversation, by the tokenizer's template."""
    batch_size: int = 16
    """Texts at a time."""
    max_length: int | None = None
    """Tokens of a text that the model reads; all of its context by default."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the weights and of the computation."""
    mesh: str = "tensor=1"
    """Devices to spread the model over, as "fsdp=2,tensor=4"."""
    seed: int = 0
    """Seed for tasks that sample."""
    output: Path | None = None
    """JSON file for the results."""
    allow_code_execution: bool = False
    """Run the programs that the model writes, which HumanEval needs. They run on this
    machine with your rights: use a container."""


def evaluate(args: Args) -> dict[str, Any]:
    """Runs what `args` describe, with progress bars.

    Returns:
      What `--output` gets: "results" by task and metric, "groups", "configs" and more
      as the harness has them, "versions" of tasks; "general_abilities", see there;
      "knowledge" and "instructions", see `probes`; "arguments", "device" and
      "packages".

    Raises:
      ValueError, OSError: An argument is wrong, or a file or data set is not there.
      ImportError: A task needs a package that is not installed.
    """
    _check(args)
    tasks = _find_tasks(args)
    items = None if args.knowledge is None else load_items(args.knowledge)
    mesh, dtype = make_mesh(args.mesh), jnp.dtype(args.dtype)
    model = load_model(
        args.model,
        dtype=dtype,
        param_dtype=dtype,
        sharding=parameter_sharding(mesh),
        adapter=args.adapter,
    )
    check_finite(model, args.adapter or args.model)
    tokenizer = load_tokenizer(args.tokenizer or args.model, model.config.vocab_size)
    found: dict[str, Any] = {}
    with jax.set_mesh(mesh):
        if tasks is not None:
            found |= _run_tasks(args, *tasks, model, tokenizer)
        if items is not None:
            items = items.first(args.limit)
            found["knowledge"] = measure_knowledge(
                model, tokenizer, items, mesh, progress=True
            )
        if args.instructions:
            found["instructions"] = measure_instructions(
                model, tokenizer, progress=True
            )
    return found | {
        "arguments": dataclasses.asdict(args),
        "device": environment()["device"],
        "packages": environment()["versions"] | {"lm_eval": version("lm_eval")},
    }


def _run_tasks(
    args: Args,
    manager: TaskManager,
    names: list[str],
    model: Llama,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """What the harness returns, as far as it is kept, and "general_abilities"."""
    # JAX has threads, which the harness's worker processes would not survive.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    lm = JaxLM(
        model,
        tokenizer,
        batch_size=args.batch_size,
        max_length=args.max_length,
        seed=args.seed,
    )
    try:
        found = lm_eval.simple_evaluate(
            lm,
            tasks=names,
            task_manager=manager,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            apply_chat_template=args.apply_chat_template,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            confirm_run_unsafe_code=args.allow_code_execution,
        )
    except DatasetGenerationError as error:  # whose cause tells what is wrong
        raise ValueError(f"tasks: {error} of {args.tasks}: {error.__cause__}") from None
    return {key: found[key] for key in KEPT if key in found} | {
        "general_abilities": general_abilities(found["results"])
    }


def general_abilities(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the paper measures forgetting by, of as many tasks as there are results of.

    Returns:
      "commonsense", the mean accuracy on HellaSwag, ARC-easy and ARC-challenge, and
      "general_abilities", the mean of that, MMLU and HumanEval; both from 0 to 1.
    """
    scores = {
        task: results[task][metric]
        for task, metric in GENERAL.items()
        if metric in results.get(task, {})
    }
    means = {}
    if scores.keys() >= set(COMMONSENSE):
        means["commonsense"] = sum(scores[task] for task in COMMONSENSE) / 3
    if scores.keys() == GENERAL.keys():
        parts = means["commonsense"], scores["mmlu"], scores["humaneval"]
        means["general_abilities"] = sum(parts) / 3
    return means


def _check(args: Args) -> None:
    for name, least in {"batch_size": 1, "limit": 1, "num_fewshot": 0}.items():
        check_least(name, getattr(args, name), least)
    check_seed(args.seed)
    args.model.stat()  # the error names it
    tokenizer_path(args.tokenizer, args.model)
    if (path := args.include_path) is not None and not path.is_dir():
        raise ValueError(f"include_path must be a directory, got {path}")
    if (path := args.output) is not None:
        parent = path.absolute().parent
        if path.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ValueError(f"output: cannot write a file {path}")


def _find_tasks(args: Args) -> tuple[TaskManager, list[str]] | None:
    """What to run, if anything; ValueError where a task is unknown or not allowed."""
    asked = args.tasks
    if asked is None:
        if args.knowledge is not None or args.instructions:
            return None
        asked = "paper"
    manager, names = _named_tasks(args, asked)
    if args.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        return manager, names
    for name, config in _leaves(manager, names):
        if config is not None and config.get("unsafe_code"):
            raise ValueError(
                f"tasks: {name} runs programs that the model writes, on this "
                "machine and with your rights; --allow-code-execution allows it"
            )
    return manager, names


def _named_tasks(args: Args, asked: str) -> tuple[TaskManager, list[str]]:
    names: dict[str, None] = {}  # a set that keeps the order
    for name in asked.split(","):
        names |= dict.fromkeys(PRESETS.get(name.strip(), (name.strip(),)))
    path = args.include_path and str(args.include_path)
    if path:
        # The harness's own are 15,000, which take seconds to read.
        manager = TaskManager(include_path=path, include_defaults=False)
        if all(config is not None for _, config in _leaves(manager, names)):
            return manager, list(names)
    manager = TaskManager(include_path=path)
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; close to it are {', '.join(close)}" if close else ""
            raise ValueError(f"tasks: no task or group is called {name!r}{hint}")
    return manager, list(names)


def _leaves(
    manager: TaskManager, tasks: Iterable[Any]
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Names and configurations, None where unknown, of tasks and of groups' tasks."""
    for task in tasks:
        if isinstance(task, dict):  # a group may change what it takes in
            task = task.get("task", ())
        if not isinstance(task, str):
            yield from _leaves(manager, task)
            continue
        entry = manager.task_index.get(task)
        config = entry and entry.cfg
        if entry is not None and config is None:  # a tag
            yield from _leaves(manager, entry.tags)
        elif config is not None and "group" in config:
            members = config.get("task", ())
            yield from _leaves(
                manager, [members] if isinstance(members, str) else members
            )
        else:
            yield task, config


def table(results: dict[str, Any]) -> str:
    """What `evaluate` returns, for a person to read."""
    if "results" not in results:
        return probes_table(results)
    parts = [make_table(results)]
    if "groups" in results:
        parts.append(make_table(results, "groups"))
    titles = {
        "commonsense": f"Commonsense, the mean of {', '.join(COMMONSENSE)}",
        "general_abilities": "General abilities, the mean of it, mmlu and humaneval",
    }
    means = results["general_abilities"].items()
    parts.append("".join(f"{titles[name]}: {mean:.4f}\n" for name, mean in means))
    parts.append(probes_table(results))
    return "\n".join(part for part in parts if part)
