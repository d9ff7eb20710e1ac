"""What this project measures of a model by itself, for examples.llama.evaluate."""

from collections.abc import Iterator
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from examples.llama.evaluation import instructions
from examples.llama.evaluation.items import Items
from examples.llama.evaluation.knowledge import Probe, summary
from examples.llama.evaluation.short_answers import answered
from examples.llama.model.llama import Llama
from examples.llama.text.tokenizer import Tokenizer


def measure_knowledge(
    model: Llama, tokenizer: Tokenizer, items: Items, mesh: Mesh, *, progress: bool
) -> dict[str, Any]:
    """How many items a model gets right, as choices and as short answers.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      items: What to ask.
      mesh: That the model lies on.
      progress: Whether to show a bar.

    Returns:
      What `knowledge.summary` returns; and "answers", the same of the items that have
      a question, by `short_answers.answered`.
    """
    limit = model.config.max_position_embeddings
    probe = Probe(items, tokenizer, mesh, max_position_embeddings=limit)
    found = summary(items, probe.right(*nnx.split(model)))
    asked = items.with_question()
    if asked.items:
        bar = "Short answers" if progress else ""
        found["answers"] = summary(
            asked, answered(model, tokenizer, asked, progress=bar)
        )
    return found


def measure_instructions(
    model: Llama, tokenizer: Tokenizer, *, progress: bool
) -> dict[str, Any]:
    """How many instructions a model obeys; see `instructions.summary`.

    Raises:
      ValueError: See `instructions.obeyed`.
    """
    bar = "Instructions" if progress else ""
    found, answers = instructions.obeyed(model, tokenizer, progress=bar)
    said = [
        {"request": check.request, "answer": answer, "obeyed": bool(obeyed)}
        for check, answer, obeyed in zip(
            instructions.CHECKS, answers, found, strict=True
        )
    ]
    return {**instructions.summary(found), "said": said}


def table(results: dict[str, Any]) -> str:
    """What is measured here, for a person to read; "" where nothing was."""
    lines: list[str] = []
    if (found := results.get("knowledge")) is not None:
        lines += _rows("Knowledge, choices right", found)
        if (answers := found.get("answers")) is not None:
            lines += _rows("Knowledge, short answers right", answers)
    if (found := results.get("instructions")) is not None:
        low, high = found["interval"]
        share = found["obeyed"]
        lines.append(f"Instructions obeyed: {share:.1%} ({low:.1%} to {high:.1%})")
        for kind, x in found["kinds"].items():
            lines.append(f"  {kind:30}{x['checks']:5}{x['obeyed']:8.1%}")
    return "".join(f"{line}\n" for line in lines)


def _rows(title: str, found: dict[str, Any]) -> Iterator[str]:
    low, high = found["interval"]
    share = found["right"]
    yield f"{title}: {share:.1%} ({low:.1%} to {high:.1%}), {found['items']} items"
    for name, x in found["relations"].items():
        low, high = x["interval"]
        shares = f"{x['right']:8.1%} ({low:.1%} to {high:.1%})"
        yield f"  {name:30}{x['items']:5}{shares}, chance {x['chance']:.1%}"
