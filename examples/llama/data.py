"""Records to learn from, and plain text to measure forgetting on, as padded tokens.

Shapes: N examples, L tokens each (max_length), B examples per batch.
"""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from examples.llama.tokenizer import END, START, UNKNOWN

PAD = UNKNOWN  # no text has this id: what has no token of its own becomes bytes

Batch = tuple[np.ndarray, np.ndarray]  # tokens int32 [B, L], mask bool [B, L]


class Dataset(NamedTuple):
    """Tokens, and which of them a loss counts when they are predicted."""

    tokens: np.ndarray  # int32 [N, L], each row from <s> on, PAD at its end
    mask: np.ndarray  # bool [N, L], never True at <s> or PAD
    truncated: int = 0  # records of which the first L tokens were kept
    dropped: int = 0  # records not in here, as those had no counted token left


def load_gsm8k(
    path: str | os.PathLike[str], tokenizer: Tokenizer, max_length: int
) -> Dataset:
    """Questions and answers as the paper trains on them: `tokenize` of `read_gsm8k`.

    Raises:
      OSError: The file cannot be read.
      ValueError: As of the two, or no record has an answer left within `max_length`.
    """
    dataset = tokenize(read_gsm8k(path), tokenizer, max_length)
    if not len(dataset.tokens):
        raise ValueError(
            f"{path}: none of {dataset.dropped} records has an answer token within "
            f"max_length {max_length}"
        )
    return dataset


def read_gsm8k(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Pairs (question, answer) from JSON lines; other fields and blank lines go by.

    Raises:
      OSError: The file cannot be read.
      ValueError: The file has no record, or a line is not UTF-8, not a JSON object or
        lacks one of the two texts; it names the file and the line.
    """
    allowed = 'expected a JSON object with the texts "question" and "answer"'
    pairs = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"{type(record).__name__} found")
            for field in ("question", "answer"):
                if field not in record:
                    raise ValueError(f'"{field}" is missing')
                if not isinstance(record[field], str):
                    raise ValueError(f'"{field}" is {type(record[field]).__name__}')
                record[field].encode()  # JSON can escape one half of a surrogate pair
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}; {allowed}") from None
        pairs.append((record["question"], record["answer"]))
    if not pairs:
        raise ValueError(f"{path}, line 1: no record in the file; {allowed}")
    return pairs


def tokenize(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, max_length: int
) -> Dataset:
    """Pairs (question, answer) in the paper's format, after ``<s>``.

    The format is ``<|user|>\\n{question}\\n<|assistant|>\\n{answer}</s>\\n``, of which
    the mask marks the answer and ``</s>``. Only ``<s>`` and that ``</s>`` are special
    tokens, the rest is text whatever it reads. A question has the ids that encoding it
    without the answer gives, as when an answer is to be generated.

    Raises:
      ValueError: `max_length` is below 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be 2 or above, got {max_length}")
    prompts = [f"<|user|>\n{question}\n<|assistant|>\n" for question, _ in pairs]
    texts = [p + answer + "\n" for p, (_, answer) in zip(prompts, pairs, strict=True)]
    tokens = np.full((len(pairs), max_length), PAD, np.int32)
    mask = np.zeros((len(pairs), max_length), bool)
    truncated = 0
    for i, encoding in enumerate(tokenizer.encode_batch(texts)):
        # In one piece, as a text encoded on its own would begin with a space.
        begin = encoding.char_to_token(len(prompts[i]))
        end = encoding.char_to_token(len(texts[i]) - 1)
        ids = [START, *encoding.ids[:end], END, *encoding.ids[end:]]
        truncated += len(ids) > max_length
        ids = ids[:max_length]
        tokens[i, : len(ids)] = ids
        mask[i, begin + 1 : end + 2] = True
    kept = mask.any(axis=1)
    # A dropped record is not counted as truncated too, though that is what it was.
    dropped = len(pairs) - int(kept.sum())
    return Dataset(tokens[kept], mask[kept], truncated - dropped, dropped)


def load_text(
    path: str | os.PathLike[str], tokenizer: Tokenizer, max_length: int
) -> Dataset:
    """Plain text in windows of `max_length` tokens: ``<s>``, then what comes next.

    The text is tokenized as a whole, and the mask marks all of its tokens.

    Raises:
      OSError: The file cannot be read.
      ValueError: It has no text, or a line is not UTF-8; or `max_length` is below 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be 2 or above, got {max_length}")
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        raise ValueError(f"{path}, line 1: no text in the file; expected UTF-8 text")
    ids = np.array(tokenizer.encode(text).ids, np.int32)
    rows = -(-len(ids) // (max_length - 1))
    padding = (0, rows * (max_length - 1) - len(ids))
    body = np.pad(ids, padding, constant_values=PAD).reshape(rows, -1)
    mask = np.pad(np.ones(len(ids), bool), padding).reshape(rows, -1)
    first = ((0, 0), (1, 0))
    return Dataset(np.pad(body, first, constant_values=START), np.pad(mask, first))


def shuffled_batches(dataset: Dataset, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of B = batch_size without end, shuffled anew in each epoch.

    They depend on the arguments alone. An epoch's last examples that do not fill a
    batch are left out; the next epoch's order leaves out others.

    Raises:
      ValueError: batch_size is below 1 or more than the examples, or seed negative.
    """
    count = len(dataset.tokens)
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size must be 1 to {count} examples, got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or above, got {seed}")

    def generate() -> Iterator[Batch]:
        for epoch in itertools.count():
            order = np.random.default_rng((seed, epoch)).permutation(count)
            for start in range(0, count - batch_size + 1, batch_size):
                rows = order[start : start + batch_size]
                yield dataset.tokens[rows], dataset.mask[rows]

    return generate()  # so that a bad argument is raised here, not at the first batch


def ordered_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """All examples once, the last batch filled up to B with rows that do not count."""
    for start in range(0, len(dataset.tokens), batch_size):
        tokens, mask = (x[start : start + batch_size] for x in dataset[:2])
        missing = ((0, batch_size - len(tokens)), (0, 0))
        yield np.pad(tokens, missing, constant_values=PAD), np.pad(mask, missing)


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1 and their line breaks."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                where = f"{path}, line {number}"
                raise ValueError(f"{where}: {error}; expected UTF-8") from None
