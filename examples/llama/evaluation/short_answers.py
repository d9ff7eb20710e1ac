"""Whether a model says what is right when it is asked, where `knowledge` has it choose.

A model may still rank the right choice first and no longer say it.
"""

import re
import unicodedata

import numpy as np

from examples.llama.evaluation.answers import ask, asked_prompts
from examples.llama.evaluation.items import Items
from examples.llama.model.generation import check_room
from examples.llama.model.llama import Llama
from examples.llama.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 24  # of an answer


def answered(
    model: Llama, tokenizer: Tokenizer, items: Items, *, progress: str = ""
) -> np.ndarray:
    """Whether the likeliest answer to each question contains the right choice.

    Args:
      model: The model.
      tokenizer: Its tokenizer. With a chat template, questions are in chat form.
      items: All with a question.
      progress: What a bar says; none by default.

    Returns:
      bool [items].

    Raises:
      ValueError: As `check_questions`.
    """
    questions = [item.question for item in items.items]
    answers = ask(
        model, tokenizer, questions, max_new_tokens=MAX_NEW_TOKENS, progress=progress
    )
    pairs = zip(answers, items.items, strict=True)
    return np.array([contains(answer.text, item.right) for answer, item in pairs])


def check_questions(model: Llama, tokenizer: Tokenizer, items: Items) -> None:
    """Raises ValueError where `answered` would, naming the items' source."""
    try:
        asked = asked_prompts(tokenizer, [item.question for item in items.items])
        check_room(model, max(map(len, asked), default=0), MAX_NEW_TOKENS)
    except ValueError as error:
        raise ValueError(f"{items.source}: {error}") from error


def contains(text: str, name: str) -> bool:
    """Whether a text has a name in it, whatever its case, accents and punctuation."""
    return f" {_normalized(name)} " in f" {_normalized(text)} "


def _normalized(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.casefold())
    letters = "".join(x for x in plain if not unicodedata.combining(x))
    return " ".join(re.findall(r"\w+", letters))
