"""Records to learn from, and plain text to measure forgetting on, as rows of tokens.

Shapes: N rows, L tokens each (max_length), B rows per batch.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from examples.llama.text.records import read_records, read_text
from examples.llama.text.templates import TEMPLATES, Example, split_all, tokenize
from examples.llama.text.tokenizer import Tokenizer

# "tokens" int32, "loss_mask" bool, "segment_ids" int32 and "positions" int32, each
# [B, L], and "row" int32 [B]; see `Dataset`.
Batch = dict[str, np.ndarray]

FIELDS = ("tokens", "loss_mask", "segment_ids", "positions")
_LARGEST_RATIO = 1_000_000  # of weights
_STEPS = 1 << 40  # so many that no run comes to their end
_BINS = 128  # rows that packing fills at the same time
# What Grain has to do here is little, as the rows are in memory.
_IN_THIS_THREAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of tokens. A row holds one record, or several packed ones, its segments."""

    tokens: np.ndarray  # int32 [N, L]
    loss_mask: np.ndarray  # bool [N, L], the tokens that count when they are predicted
    segment_ids: np.ndarray  # int32 [N, L], from 1 in each row; 0 is padding
    positions: np.ndarray  # int32 [N, L], from 0 in each segment
    sources: Sequence[Sequence[str]]  # of each row, the records as "file:line"
    truncated: int = 0  # records longer than L tokens, whose first L were kept
    dropped: int = 0  # records not in here, as those had no counted token left
    bad: tuple[str, ...] = ()  # why records were skipped, with file and line
    escaped: int = 0  # records whose text reads like a turn or a special token
    empty: tuple[str, ...] = ()  # records with an empty answer, which does not count

    def __len__(self) -> int:
        return len(self.tokens)

    def records(self, row: int) -> list[str]:
        """The records in a row, as "file:line", in the order of their segments."""
        return list(self.sources[row])


def load_dataset(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    pack: bool = False,
    template: str = "paper",
    skip_bad: bool = False,
) -> Dataset:
    """Tokenizes records. Only answers and their end tokens count in the loss.

    An empty answer, or one of nothing but whitespace, does not count, nor does its end
    token. A record of such answers alone is dropped.

    With the template "paper", a conversation begins with the bos token, and has
    ``<|user|>\\n{content}\\n`` of a user, the same with ``<|system|>``, and
    ``<|assistant|>\\n{content}</s>\\n`` of an assistant. ``</s>`` is the tokenizer's
    end token, all else is text whatever it reads. With the template "tokenizer" it is
    the tokenizer's own chat template that decides, also about the bos token. Plain
    text has both tokens around it, and all but the first count.

    What a message says makes no turn, in either template: see
    `examples.llama.text.guard`. Records with such text are kept, and counted as
    `escaped`.

    Args:
      path: See `examples.llama.text.records.read_records`.
      tokenizer: The model's.
      max_length: L. Longer records keep their first L tokens; those that have no
        counted token then are dropped.
      pack: Whether a row holds as many records as fit, which attention and positions
        must keep apart, or one.
      template: "paper" or "tokenizer".
      skip_bad: Whether to skip malformed records, and those that the tokenizer's
        template refuses.

    Raises:
      OSError: The file cannot be read.
      ValueError: An argument or a record is bad, or none has a counted token.
    """
    _check_length(max_length)
    if template not in TEMPLATES:
        raise ValueError(f"template must be paper or tokenizer, got {template!r}")
    records, bad = read_records(path, skip_bad=skip_bad)
    pieces, empty = [], []
    for record, found in zip(
        records, split_all(records, tokenizer, template), strict=True
    ):
        if isinstance(found, ValueError):
            if not skip_bad:
                raise found
            bad.append(str(found))
            continue
        pieces.append(found)
        if record.has_empty_answer:
            empty.append(record.source)
    examples, truncated, dropped = [], 0, 0
    for example in tokenize(pieces, tokenizer):
        short = Example(
            example.tokens[:max_length], example.loss_mask[:max_length], example.source
        )
        if not short.loss_mask.any():
            dropped += 1
            continue
        truncated += len(example.tokens) > max_length
        examples.append(short)
    if not pieces:
        raise ValueError(f"{path}: all records are bad, {len(bad)}. {bad[0]}")
    if not examples:
        message = (
            f"{path}: none of {len(pieces)} records has a token to learn within "
            f"max_length {max_length}"
        )
        if empty:
            message += f"; {len(empty)} have an empty answer, the first {empty[0]}"
        raise ValueError(message)
    make_rows = _packed_rows if pack else one_a_row
    rows = make_rows(examples, max_length, tokenizer.pad_id)
    return dataclasses.replace(
        rows,
        truncated=truncated,
        dropped=dropped,
        bad=tuple(bad),
        escaped=sum(text.escaped for text in pieces),
        empty=tuple(empty),
    )


def load_text(
    path: str | os.PathLike[str], tokenizer: Tokenizer, max_length: int
) -> Dataset:
    """Plain text in windows of L = max_length tokens, each beginning with bos.

    The text is tokenized as a whole, and all of its tokens count (without a bos token,
    all but a window's first). A window's record is the line that it begins in.

    Raises:
      OSError: The file cannot be read.
      ValueError: It has no text, or is not UTF-8; or `max_length` is below 2.
    """
    _check_length(max_length)
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}, line 1: no text in the file; expected UTF-8 text")
    (encoding,) = tokenizer.encode_batch([text])
    ids = np.array(encoding.ids, np.int32)
    breaks = [i for i, character in enumerate(text) if character == "\n"]
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    width = max_length - len(start)
    examples = []
    for first in range(0, len(ids), width):
        tokens = np.concatenate([np.array(start, np.int32), ids[first : first + width]])
        characters = encoding.token_to_chars(first)
        assert characters is not None, "only special tokens have none"
        line = np.searchsorted(breaks, characters[0]) + 1
        examples.append(
            Example(tokens, np.arange(len(tokens)) > 0, f"{os.fspath(path)}:{line}")
        )
    return one_a_row(examples, max_length, tokenizer.pad_id)


def training_batches(
    datasets: Sequence[Dataset],
    weights: Sequence[float],
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Batches of B = batch_size rows without end, mixed from several datasets.

    Each dataset is shuffled anew whenever all of its rows were seen. The batches
    depend on the arguments alone. Concatenated in the order of their processes, those
    of several processes are the batch of one.

    Args:
      datasets: Where the rows come from, of the same L.
      weights: How many rows each dataset gives in proportion to the others, within
        about one per cent; packed rows count as one each.
      batch_size: B, of all processes together; it may exceed the rows.
      seed: Of the shuffling.
      process_index: Which rows of a batch to give: B / process_count, from
        process_index times as many on.
      process_count: The number of processes, a divisor of B.

    Returns:
      An iterator. A batch's "row" counts on from one dataset to the next; see
      `records_of`. `get_state` gives a dictionary for JSON, after which an iterator of
      the same datasets, weights, batch size and seed resumes by `set_state`, also with
      other processes.

    Raises:
      ValueError: An argument is outside these limits.
    """
    _check_batches(batch_size, process_index, process_count)
    if not datasets or len(datasets) != len(weights):
        raise ValueError(
            f"datasets and weights must be as many, 1 or more, got {len(datasets)} and "
            f"{len(weights)}"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights must be above 0 and finite, got {list(weights)}")
    if max(weights) > _LARGEST_RATIO * min(weights):
        raise ValueError(
            f"weights must be at most {_LARGEST_RATIO:,} times each other, got "
            f"{list(weights)}"
        )
    if not all(len(dataset) for dataset in datasets):
        sizes = [len(dataset) for dataset in datasets]
        raise ValueError(f"datasets must have 1 row or more, got {sizes}")
    lengths = {dataset.tokens.shape[1] for dataset in datasets}
    if len(lengths) > 1:
        raise ValueError(
            f"datasets must have rows of one length, got {sorted(lengths)}"
        )
    if seed < 0:
        raise ValueError(f"seed must be 0 or above, got {seed}")

    ends = np.cumsum([len(dataset) for dataset in datasets])
    # Grain adds the epoch to a seed, so neighbouring ones would repeat each other.
    seeds = np.random.SeedSequence(seed).generate_state(len(datasets))
    shuffled = [
        grain.MapDataset.range(end - len(dataset), end).shuffle(int(seed)).repeat()
        for dataset, end, seed in zip(datasets, ends.tolist(), seeds, strict=True)
    ]
    mixed = grain.MapDataset.mix(shuffled, list(weights))
    local = batch_size // process_count

    def batch_of(step: int) -> Batch:
        first = step * batch_size + process_index * local
        rows = [mixed[i] for i in range(first, first + local)]
        places = [_place(ends, row) for row in rows]
        batch = {
            name: np.stack([getattr(datasets[d], name)[row] for d, row in places])
            for name in FIELDS
        }
        return batch | {"row": np.array(rows, np.int32)}

    steps = grain.MapDataset.range(_STEPS).map(batch_of)
    return iter(steps.to_iter_dataset(_IN_THIS_THREAD))


def records_of(datasets: Sequence[Dataset], row: int) -> list[str]:
    """The records, as "file:line", in a "row" of `training_batches`."""
    d, row = _place(np.cumsum([len(dataset) for dataset in datasets]), row)
    return datasets[d].records(row)


def ordered_batches(
    dataset: Dataset, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """All rows once, in order, in batches of B = batch_size.

    The last batch is filled up with rows of padding, which are "row" -1. Processes
    share a batch as in `training_batches`.

    Raises:
      ValueError: batch_size is below 1, or no multiple of process_count.
    """
    _check_batches(batch_size, process_index, process_count)
    local = batch_size // process_count

    def generate() -> Iterator[Batch]:
        for start in range(0, len(dataset), batch_size):
            rows = np.arange(start, start + batch_size, dtype=np.int32)
            rows = rows[process_index * local : (process_index + 1) * local]
            rows[rows >= len(dataset)] = -1
            batch = {name: getattr(dataset, name)[rows] for name in FIELDS}
            for array in batch.values():
                array[rows < 0] = 0
            yield batch | {"row": rows}

    return generate()  # so that a bad argument is raised here, not at the first batch


def one_a_row(examples: Sequence[Example], length: int, pad_id: int) -> Dataset:
    """Examples of up to `length` tokens, one in each row."""
    tokens = np.full((len(examples), length), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        mask[row, : len(example.tokens)] = example.loss_mask
    lengths = np.array([len(example.tokens) for example in examples])[:, None]
    places = np.arange(length)[None]
    used = places < lengths
    return Dataset(
        tokens,
        mask,
        segment_ids=used.astype(np.int32),
        positions=np.where(used, places, 0).astype(np.int32),
        sources=[[example.source] for example in examples],
    )


def _packed_rows(examples: Sequence[Example], length: int, pad_id: int) -> Dataset:
    """As many examples in each row as fit."""
    source = grain.MapDataset.source([example._asdict() for example in examples])
    packed = grain.experimental.FirstFitPackIterDataset(
        source.to_iter_dataset(_IN_THIS_THREAD),
        length_struct={"tokens": length, "loss_mask": length},
        padding_struct={"tokens": pad_id, "loss_mask": False},
        meta_features=("loss_mask", "source"),
        num_packing_bins=_BINS,
        shuffle_bins=False,
    )
    rows = list(packed)
    return Dataset(
        tokens=np.stack([row["tokens"] for row in rows]),
        loss_mask=np.stack([row["loss_mask"] for row in rows]),
        segment_ids=np.stack([row["tokens_segment_ids"] for row in rows]),
        positions=np.stack([row["tokens_positions"] for row in rows]),
        sources=[row["source"] for row in rows],
    )


def _place(ends: np.ndarray, row: int) -> tuple[int, int]:
    """A row of several datasets: which one has it, and where."""
    d = int(np.searchsorted(ends, row, side="right"))
    return d, int(row - (ends[d - 1] if d else 0))


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be 2 or above, got {max_length}")


def _check_batches(batch_size: int, process_index: int, process_count: int) -> None:
    if process_count < 1:
        raise ValueError(f"process_count must be 1 or above, got {process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be 0 to {process_count - 1}, got {process_index}"
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be 1 or more times the {process_count} processes, got "
            f"{batch_size}"
        )
