"""Rows of tokens, in memory or in a file that is mapped into it.

Shapes: N rows of up to L tokens, T in this one, of S records.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

# "tokens" int32, "loss_mask" bool, "segment_ids" int32 and "positions" int32, each
# [B, L], and from `batches` "row" int32 [B]; see `Dataset.take`.
Batch = dict[str, np.ndarray]

FIELDS = ("tokens", "loss_mask", "segment_ids", "positions")
_AT_ONCE = 1024  # rows that are written at the same time
_SUMMARY = b"summary"


class Row(NamedTuple):
    """A row without its padding. It has one record, or several packed ones."""

    tokens: np.ndarray  # int [T]
    loss_mask: np.ndarray  # bool [T], the tokens that count when they are predicted
    lengths: np.ndarray  # int [S], the tokens of each record, T together
    sources: list[str]  # of each record, as "file:line"


class Noted(NamedTuple):
    """Records that the user should know of."""

    number: int = 0  # of records
    first: tuple[str, ...] = ()  # messages about the first of them


class Outcome(NamedTuple):
    """How many records were truncated, left out or worth a message."""

    truncated: int = 0  # longer than L tokens; the first L were kept
    dropped: int = 0  # left out, because no counted token was left
    escaped: int = 0  # text that reads like a turn or a special token
    bad: Noted = Noted()  # skipped; why, with file and line
    empty: Noted = Noted()  # an empty answer, which does not count; file and line


class Dataset:
    """N rows, as a `RowWriter` wrote them.

    Args:
      source: What it wrote: the path of an Arrow file, which is mapped into memory, or
        the content of one.

    Attributes:
      length: L.
      highest: The largest token, -1 where there is none.
      outcome: How many records were truncated, left out or worth a message.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is damaged.
    """

    def __init__(self, source: str | os.PathLike[str] | pa.Buffer):
        if not isinstance(source, pa.Buffer):
            source = pa.memory_map(os.fspath(source))
        self._reader = pa.ipc.open_file(source)
        last = self._reader.num_record_batches - 1
        _, metadata = self._reader.get_batch_with_custom_metadata(last)
        summary = json.loads(metadata[_SUMMARY])
        self._rows: int = summary["rows"]
        self._pad_id: int = summary["pad_id"]
        self.length: int = summary["length"]
        self.highest: int = summary["highest"]
        outcome = summary["outcome"]
        for name in ("bad", "empty"):
            count, first = outcome[name]
            outcome[name] = Noted(count, tuple(first))
        self.outcome = Outcome(**outcome)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(f"row must be 0 to {len(self) - 1}, got {row}")
        tokens, loss_mask, lengths = self._numbers(row)
        return Row(tokens.astype(np.int32), loss_mask, lengths, self.records(row))

    def records(self, row: int) -> list[str]:
        """The records in a row, as "file:line", in the order of their segments."""
        batch = self._reader.get_batch(row // _AT_ONCE)
        return batch.column(3)[row % _AT_ONCE].as_py()

    def take(self, rows: Sequence[int] | np.ndarray | None = None) -> Batch:
        """Rows with their padding; by default all.

        Args:
          rows: Which, B of them. -1 gives one of nothing but zeros.

        Returns:
          Each [B, L]: "tokens" int32, "loss_mask" bool, "segment_ids" int32, from 1 in
          each row, where 0 is padding, and "positions" int32, from 0 in each segment.
        """
        rows = range(len(self)) if rows is None else rows
        shape = len(rows), self.length
        batch = {name: np.zeros(shape, np.int32) for name in FIELDS}
        batch["loss_mask"] = np.zeros(shape, bool)
        for i, row in enumerate(rows):
            if row < 0:
                continue
            tokens, mask, lengths = self._numbers(int(row))
            used = len(tokens)
            batch["tokens"][i, :used], batch["tokens"][i, used:] = tokens, self._pad_id
            batch["loss_mask"][i, :used] = mask
            segments = np.arange(len(lengths))
            batch["segment_ids"][i, :used] = np.repeat(segments + 1, lengths)
            begins = np.repeat(np.cumsum(lengths) - lengths, lengths)
            batch["positions"][i, :used] = np.arange(used) - begins
        return batch

    def _numbers(self, row: int) -> list[np.ndarray]:
        """A row's tokens, loss_mask and lengths."""
        batch = self._reader.get_batch(row // _AT_ONCE)
        columns = (batch.column(i)[row % _AT_ONCE].values for i in range(3))
        return [values.to_numpy(zero_copy_only=False) for values in columns]


class RowWriter:
    """Writes rows for a `Dataset` to read.

    Args:
      sink: What to write to, a path or one of Arrow's streams.
      length: L.
      pad_id: The token of padding.
      vocab_size: Of the tokenizer. With up to 65,536 a token takes two bytes.

    Attributes:
      count: Number of rows so far.
    """

    def __init__(
        self, sink: Any, length: int, pad_id: int, vocab_size: int | None = None
    ):
        small = vocab_size is not None and vocab_size <= 1 << 16
        self._tokens = np.uint16 if small else np.uint32
        schema = pa.schema(
            {
                "tokens": pa.list_(pa.from_numpy_dtype(self._tokens)),
                "loss_mask": pa.list_(pa.bool_()),
                "lengths": pa.list_(pa.int32()),
                "sources": pa.list_(pa.string()),
            }
        )
        self._file = pa.ipc.new_file(sink, schema)
        self._schema = schema
        self._summary: dict[str, Any] = {"length": length, "pad_id": pad_id}
        self._waiting: list[Row] = []
        self.count, self._highest = 0, -1

    def write(self, row: Row) -> None:
        self._waiting.append(row)
        self.count += 1
        if len(row.tokens):
            self._highest = max(self._highest, int(row.tokens.max()))
        if len(self._waiting) == _AT_ONCE:
            self._flush()

    def close(self, outcome: Outcome) -> None:
        """Ends the file with the counts of the records."""
        summary = self._summary | {
            "rows": self.count,
            "highest": self._highest,
            "outcome": outcome._asdict(),
        }
        self._flush({_SUMMARY: json.dumps(summary)})
        self._file.close()

    def _flush(self, metadata: dict[bytes, str] | None = None) -> None:
        rows, self._waiting = self._waiting, []
        columns = [
            _lists([row.tokens for row in rows], self._tokens),
            _lists([row.loss_mask for row in rows], np.bool_),
            _lists([row.lengths for row in rows], np.int32),
            pa.array([row.sources for row in rows], self._schema.field(3).type),
        ]
        batch = pa.record_batch(columns, schema=self._schema)
        self._file.write_batch(batch, custom_metadata=metadata)


def row_of_record(tokens: np.ndarray, loss_mask: np.ndarray, source: str) -> Row:
    """A row of one record."""
    return Row(tokens, loss_mask, np.array([len(tokens)]), [source])


def in_memory(rows: Sequence[Row], length: int, pad_id: int) -> Dataset:
    """A data set of these rows."""
    sink = pa.BufferOutputStream()
    writer = RowWriter(sink, length, pad_id)
    for row in rows:
        writer.write(row)
    writer.close(Outcome())
    return Dataset(sink.getvalue())


def _lists(arrays: Sequence[np.ndarray], dtype: Any) -> pa.ListArray:
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)
    return pa.ListArray.from_arrays(ends, pa.array(values))
