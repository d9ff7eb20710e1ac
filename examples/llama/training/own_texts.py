"""Texts that a pretrained model writes by itself, as tokens, rows and a file.

A chat model writes conversations: it starts where its template has the user's first
message, and writes that, the answer, and so on. Another model starts behind its start
token, or, where it knows none, behind its end token, as in lm-evaluation-harness.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from examples import terminal
from examples.files import write_json_lines
from examples.llama.model.generation import generate
from examples.llama.model.llama import Llama
from examples.llama.text.dataset import Dataset, in_memory, row_of_record
from examples.llama.text.tokenizer import Tokenizer
from mofo_jax.continual import draw_texts

AT_ONCE = 32  # texts that a model writes side by side; another number, other texts
FILE = "self_replay.jsonl"


def drawing(
    model: Llama,
    tokenizer: Tokenizer,
    length: int,
    seed: int,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Arguments of `mofo_jax.continual.draw_texts` for a model's own texts.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      length: The most tokens of a text, its start and end included.
      seed: Seed of the draws.
      temperature: 1 draws from the model's own distribution, less prefers what is
        likely, 0 takes the likeliest token each time, so that all texts are the same.

    Raises:
      ValueError: Nothing fits in `length` behind what a text starts with.
    """
    start, ends = _start_and_ends(tokenizer)
    if length <= len(start):
        raise ValueError(
            f"max_length must be above {len(start)}, the tokens before what the model "
            f"writes, got {length}"
        )

    def sample(prompts: np.ndarray, key: jax.Array) -> np.ndarray:
        rows = np.tile(np.array(start, np.int32), (len(prompts), 1))
        new = generate(
            model,
            rows,
            max_new_tokens=length - len(start),
            temperature=temperature,
            key=key,
            eos_id=ends,
        )
        return np.concatenate([rows[:, 1:], new], axis=1)

    return {
        "sample": sample,
        "bos_id": start[0],
        "end_ids": ends,
        "key": jax.random.key(seed),
        "batch_size": AT_ONCE,
    }


def _start_and_ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What each text starts with, one token or more, and the tokens that end it."""
    if tokenizer.chat_template is not None:
        question = {"role": "user", "content": "A question."}
        text = tokenizer.apply_chat_template([question])
        before, found, _ = text.partition(question["content"])
        if found and (start := tokenizer.encode_chat(before).ids):
            # The end of a turn is not that of the conversation.
            ends = set(tokenizer.eos_ids) - {*tokenizer.turn_end_ids, *start}
            return start, sorted(ends)
    if tokenizer.bos_id is None:
        return [tokenizer.eos_ids[0]], [*tokenizer.eos_ids]
    # A model of many texts may begin the next one with bos instead of an end.
    return [tokenizer.bos_id], [tokenizer.bos_id, *tokenizer.eos_ids]


def write_texts(
    model: Llama,
    tokenizer: Tokenizer,
    count: int,
    length: int,
    *,
    seed: int,
    temperature: float = 1.0,
    progress: bool = False,
) -> list[list[int]]:
    """Texts that a model draws.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      count: How many.
      length: The most tokens of each, its start and end included.
      seed: Of the draws, on which alone they depend.
      temperature: See `drawing`.
      progress: Whether to show a bar.

    Returns:
      The tokens of each, 2 or more.

    Raises:
      ValueError: Nothing fits in `length` behind what a text starts with.
    """
    options = drawing(model, tokenizer, length, seed, temperature)
    style = terminal.bar_style()
    with tqdm(total=count, desc="writing", disable=not progress, **style) as bar:
        texts = draw_texts(
            count=count, progress=lambda done, _: bar.update(done - bar.n), **options
        )
        return list(texts)


def text_rows(
    texts: Sequence[Sequence[int]], length: int, pad_id: int, source: str = "text"
) -> Dataset:
    """A row for each text. All tokens but the first count."""
    rows = [
        row_of_record(
            np.array(tokens, np.int32),
            np.arange(len(tokens)) > 0,
            f"{source}:{number}",
        )
        for number, tokens in enumerate(texts, start=1)
    ]
    return in_memory(rows, length, pad_id)


def save_texts(rows: Dataset, tokenizer: Tokenizer, output: Path) -> None:
    """Writes OUTPUT/self_replay.jsonl, from which a resumed run takes its texts."""
    lines = []
    for row in range(len(rows)):
        ids = rows[row].tokens.tolist()
        lines.append({"text": tokenizer.decode(ids), "tokens": ids})
    write_json_lines(output / FILE, lines)


def read_texts(path: Path, count: int) -> list[list[int]]:
    """The first texts of a file of `save_texts`; ValueError where it lacks some."""
    texts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            tokens = json.loads(line)["tokens"]
            texts.append(np.array(tokens, np.int32).tolist())
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: no tokens of a text") from None
    if len(texts) < count:
        raise ValueError(f"{path}: expected {count} texts or more, found {len(texts)}")
    return texts[:count]
