"""A model's answers to records, many at a time."""

from collections.abc import Sequence

import numpy as np

from examples.llama.model.generation import generate, left_padded
from examples.llama.model.llama import Llama
from examples.llama.text.records import Record
from examples.llama.text.templates import split, tokenize
from examples.llama.text.tokenizer import Tokenizer

AT_ONCE = 16  # questions answered side by side
STEP = 32  # widths are multiples of it, so that few are compiled


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
    texts = [""] * len(prompts)
    # Of like length together, for the least padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
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
            texts[i] = tokenizer.decode(tokenizer.before_end(ids))
    return texts
