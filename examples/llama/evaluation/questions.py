"""Items from packages, or from a file of one's own.

A file has a JSON object on each line:

    {"prompt": "The capital of Peru is", "choices": ["Lima", "Rome"], "answer": "Lima"}

"question" asks the same in words, for answers in a conversation. Where it is alone, the
prompt is "Question: {question}\\nAnswer:". "relation" names a kind of item, by which
results are summed up. Other fields are ignored.
"""

import json
from pathlib import Path
from typing import Any

from examples.llama.evaluation.items import Item, Items
from examples.llama.text.records import read_text

WORLD = "world"  # the items that packages make, see world_facts


def load_items(source: str) -> Items:
    """The items of "world", or of a file of JSON lines.

    Raises:
      OSError: The file cannot be read.
      ValueError: A line is no item, or the file has none; the message has the line.
      ImportError: A package that makes "world" is not installed.
    """
    if source == WORLD:
        # Here, because only these items need the packages of an extra.
        from examples.llama.evaluation.world_facts import packages, world_facts

        return Items(tuple(world_facts()), WORLD, packages())
    items = []
    for number, line in enumerate(read_text(source).split("\n"), start=1):
        if line.strip():
            try:
                items.append(_item(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{source}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{source}: no items; expected one JSON object a line")
    return Items(tuple(items), Path(source).name, {})


def _item(value: Any) -> Item:
    """The item of a line. A bad line raises a ValueError that says what is allowed."""
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} found; expected a JSON object")
    question, choices = _text(value, "question", ""), value.get("choices")
    prompt = _text(value, "prompt", f"Question: {question}\nAnswer:")
    if not ("prompt" in value or question):
        raise ValueError('expected "prompt" or "question"')
    if not (
        isinstance(choices, list)
        and len(choices) > 1
        and all(isinstance(x, str) and x.strip() for x in choices)
        and len(set(choices)) == len(choices)
    ):
        raise ValueError(
            f'"choices" must be 2 or more different texts, got {choices!r:.100}'
        )
    answer = value.get("answer")
    if answer not in choices:
        raise ValueError(f'"answer" must be one of the choices, got {answer!r:.50}')
    relation = _text(value, "relation", "all")
    return Item(prompt, tuple(choices), choices.index(answer), question, relation)


def _text(value: dict[str, Any], field: str, default: str) -> str:
    text = value.get(field, default)
    if not isinstance(text, str) or (field in value and not text.strip()):
        raise ValueError(
            f'"{field}" must be a text that is not empty, got {text!r:.50}'
        )
    text.encode()  # JSON can escape one half of a surrogate pair
    return text
