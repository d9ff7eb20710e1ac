"""A model's answers to records, many at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from examples import terminal
from examples.llama.model.generation import generate, left_padded
from examples.llama.model.llama import Llama
from examples.llama.text.records import Record
from examples.llama.text.templates import split, tokenize
from examples.llama.text.tokenizer import Tokenizer

AT_ONCE = 16  # questions answered side by side
STEP = 32  # widths are multiples of it, so that few are compiled


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
    """The likeliest answer to each record's question.

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
    for record in records:
        if isinstance(record.content, str) or len(record.content) < 2:
            raise ValueError(f"{record.source}: expected a question and its answer")
    pieces = [split(record, tokenizer, template) for record in records]
    prompts = []
    for example in tokenize(pieces, tokenizer):
        begin = int(np.argmax(example.loss_mask))
        prompts.append(example.tokens[:begin][-max_length:])
    found = complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
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
    prompts, chat = [], tokenizer.chat_template is not None
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for question in questions:
        if chat:
            messages = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            prompts.append(tokenizer.encode_chat(text).ids)
        else:
            text = f"Question: {question}\nAnswer:"
            prompts.append(start + tokenizer.encode(text))
    found = complete(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, progress=progress
    )
    if chat:
        return found
    return [
        Answer(x.text.strip().split("\n")[0], x.ended or "\n" in x.text.strip())
        for x in found
    ]


def complete(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    progress: str = "",
) -> list[Answer]:
    """What a model says after each prompt, of tokens; see `ask`."""
    answers = [Answer("", False)] * len(prompts)
    # Of like length together, for the least padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    style = terminal.bar_style()
    with tqdm(total=len(order), desc=progress, disable=not progress, **style) as bar:
        for first in range(0, len(order), AT_ONCE):
            chosen = order[first : first + AT_ONCE]
            width = -(-len(prompts[chosen[-1]]) // STEP) * STEP
            tokens, mask = left_padded([prompts[i] for i in chosen], AT_ONCE, width)
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
