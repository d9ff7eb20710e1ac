"""A model's answers: to many records at a time, or to one as it is written."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from examples import terminal
from examples.llama.model.generation import (
    check_room,
    decode,
    generate,
    left_padded,
    padded_width,
    prefill,
)
from examples.llama.model.llama import Llama
from examples.llama.text.records import Message, Record
from examples.llama.text.templates import prompts
from examples.llama.text.tokenizer import Tokenizer

AT_ONCE = 16  # prompts continued side by side
STEP = 32  # widths are multiples of it, so that few are compiled
SHOWN_AT_ONCE = 4  # tokens that `write` waits for


class Answer(NamedTuple):
    text: str
    ended: bool  # by an end token, not because it became too long


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    template: str,
    max_length: int,
    max_new_tokens: int,
) -> list[str]:
    """The likeliest answer to each record's last question.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      records: Conversations that end in an answer.
      template: See `text.rows.load_dataset`.
      max_length: Of longer questions only the last tokens are read, so many.
      max_new_tokens: The longest answer.

    Raises:
      ValueError: A record is plain text, or has no question before its answer; or the
        lengths together exceed the model's positions.
    """
    questions = []
    for content, source in records:
        if isinstance(content, str) or len(content) < 2:
            raise ValueError(f"{source}: expected a question and its answer")
        questions.append(Record(content[:-1], source))
    asked = [x[-max_length:] for x in prompts(questions, tokenizer, template)]
    found = complete(model, tokenizer, asked, max_new_tokens=max_new_tokens)
    return [answer.text for answer in found]


def ask(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    progress: str = "",
) -> list[Answer]:
    """The likeliest answer to each question, in chat form where there is a template.

    Otherwise a question is "Question: {question}\\nAnswer:", and its answer a line.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      questions: What to ask, each in a conversation of its own.
      max_new_tokens: The longest answer.
      progress: What a bar says; none by default.

    Raises:
      ValueError: The template refuses a question; or the lengths together exceed the
        model's positions.
    """
    asked = asked_prompts(tokenizer, questions)
    found = complete(
        model, tokenizer, asked, max_new_tokens=max_new_tokens, progress=progress
    )
    if tokenizer.chat_template is not None:
        return found
    return [
        Answer(x.text.strip().split("\n")[0], x.ended or "\n" in x.text.strip())
        for x in found
    ]


def asked_prompts(tokenizer: Tokenizer, questions: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each question as `ask` puts it, int32 [T].

    Raises:
      ValueError: The template refuses a question.
    """
    chat = tokenizer.chat_template is not None
    records = [
        Record((Message("user", x),) if chat else f"Question: {x}\nAnswer:", "")
        for x in questions
    ]
    return prompts(records, tokenizer, "tokenizer")


def complete(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    progress: str = "",
) -> list[Answer]:
    """The likeliest text after each prompt, up to an end token.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      prompts: int32 [T] each, see `text.templates.prompts`.
      max_new_tokens: The most tokens of a text.
      progress: What a bar says; none by default.

    Raises:
      ValueError: The lengths together exceed the model's positions.
    """
    answers = [Answer("", False)] * len(prompts)
    rows = min(AT_ONCE, len(prompts))
    # Of like length together, for the least padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    style = terminal.bar_style()
    with tqdm(total=len(order), desc=progress, disable=not progress, **style) as bar:
        for first in range(0, len(order), AT_ONCE):
            chosen = order[first : first + AT_ONCE]
            width = -(-len(prompts[chosen[-1]]) // STEP) * STEP
            tokens, mask = left_padded([prompts[i] for i in chosen], rows, width)
            new = generate(
                model,
                tokens,
                mask=mask,
                max_new_tokens=max_new_tokens,
                eos_id=tokenizer.eos_ids,
            )
            for i, ids in zip(chosen, np.asarray(new).tolist(), strict=False):
                kept = tokenizer.before_end(ids)
                answers[i] = Answer(tokenizer.decode(kept), len(kept) < len(ids))
            bar.update(len(chosen))
    return answers


def write(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> Iterator[str]:
    """The text after a prompt, up to an end token, in parts as the model writes it.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      prompt: int32 [T], see `text.templates.prompts`.
      max_new_tokens: See `generate`.
      temperature: See `generate`.
      key: See `generate`.

    Yields:
      Parts of whole characters, none of them empty.

    Raises:
      ValueError: An argument is outside the limits of `generate`.
    """
    check_room(model, len(prompt), max_new_tokens)
    width = padded_width(len(prompt), model.config.max_position_embeddings)
    tokens, mask = left_padded([prompt], 1, width)
    steps = -(-max_new_tokens // SHOWN_AT_ONCE)
    decoding = prefill(model, tokens, mask=mask, max_new_tokens=steps * SHOWN_AT_ONCE)
    ids: list[int] = []
    shown = ""
    for step in range(1, steps + 1):
        new, decoding = decode(
            model,
            decoding,
            max_new_tokens=SHOWN_AT_ONCE,
            temperature=temperature,
            key=key,
            eos_id=tokenizer.eos_ids,
        )
        ids = [*ids, *new[0].tolist()][:max_new_tokens]
        kept = tokenizer.before_end(ids)
        last = step == steps or len(kept) < len(ids)
        text = tokenizer.decode(kept)
        if not last:  # of a character's bytes some may be missing
            text = text.rstrip("\ufffd")
        if part := text[len(shown) :]:
            yield part
            shown = text
        if last:
            return
