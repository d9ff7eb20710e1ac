"""Records to learn from, and plain text to measure forgetting on, as rows of tokens.

Shapes: rows of up to L tokens (max_length).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from itertools import starmap
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from examples import terminal
from examples.files import replacing, sha256, waiting, write_bytes
from examples.llama.text.dataset import (
    Dataset,
    Noted,
    Outcome,
    Row,
    RowWriter,
    in_memory,
    row_of_record,
)
from examples.llama.text.records import Record, RecordReader, read_text
from examples.llama.text.templates import (
    TEMPLATES,
    Example,
    Pieces,
    split_all,
    tokenize,
)
from examples.llama.text.tokenizer import Tokenizer

IN_MEMORY = 64 << 20  # bytes of records whose rows are held in memory
_FIRST = 100  # messages about records that are kept
_BINS = 128  # rows that packing fills at the same time


def load_dataset(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    pack: bool = False,
    template: str = "paper",
    skip_bad: bool = False,
    cache_dir: Path | None = None,
    progress: bool = False,
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
      path: See `examples.llama.text.records.RecordReader`.
      tokenizer: The model's.
      max_length: L. Longer records keep their first L tokens; those that have no
        counted token then are dropped.
      pack: Whether a row holds as many records as fit, which attention and positions
        must keep apart, or one.
      template: "paper" or "tokenizer".
      skip_bad: Whether to skip malformed records, and those that the tokenizer's
        template refuses.
      cache_dir: A directory for the rows of data with more than `IN_MEMORY` bytes. A
        file there holds them and is mapped into memory. Later calls with the same data
        and arguments use it again. With None all rows are held in memory.
      progress: Whether to show a bar.

    Raises:
      OSError: A file cannot be read, or that of the rows cannot be written.
      ValueError: An argument or a record is bad, or none has a counted token.
    """
    _check_length(max_length)
    if template not in TEMPLATES:
        raise ValueError(f"template must be paper or tokenizer, got {template!r}")
    reader = RecordReader(path)
    arguments: dict[str, Any] = {
        "max_length": max_length,
        "pack": pack,
        "template": template,
        "skip_bad": skip_bad,
    }

    def write(sink: Any) -> None:
        _Maker(tokenizer, **arguments).write(reader, sink, progress=progress)

    if cache_dir is not None and reader.size > IN_MEMORY:
        return _cached(cache_dir / f"{_key(reader, tokenizer, arguments)}.arrow", write)
    sink = pa.BufferOutputStream()
    write(sink)
    return Dataset(sink.getvalue())


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
    rows = []
    for first in range(0, len(ids), width):
        tokens = np.concatenate([np.array(start, np.int32), ids[first : first + width]])
        characters = encoding.token_to_chars(first)
        assert characters is not None, "only special tokens have none"
        line = np.searchsorted(breaks, characters[0]) + 1
        counted = np.arange(len(tokens)) > 0
        rows.append(row_of_record(tokens, counted, f"{os.fspath(path)}:{line}"))
    return in_memory(rows, max_length, tokenizer.pad_id)


class _Maker:
    """Makes rows of records one after the other, and counts what became of these."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        pack: bool,
        template: str,
        skip_bad: bool,
    ):
        self._tokenizer = tokenizer
        self._length = max_length
        self._pack = pack
        self._template = template
        self._skip_bad = skip_bad
        self._found = self._truncated = self._dropped = self._escaped = 0
        self._bad, self._empty = _Notes(), _Notes()

    def write(self, reader: RecordReader, sink: Any, *, progress: bool) -> None:
        """Writes the rows; ValueError where a record is bad, or none can be learned."""
        tokenizer, length = self._tokenizer, self._length
        vocab_size = tokenizer.backend.get_vocab_size()
        style = terminal.bar_style() | {"unit_scale": True, "delay": 1}
        with tqdm(
            total=reader.size, desc="tokenizing", disable=not progress, **style
        ) as bar:

            def read() -> Iterator[Record | ValueError]:
                for record in reader:
                    bar.update(reader.done - bar.n)
                    yield record

            writer = RowWriter(sink, length, tokenizer.pad_id, vocab_size)
            examples = self._examples(self._texts(self._records(read())))
            rows = starmap(row_of_record, examples)
            for row in _packed(examples, length) if self._pack else rows:
                writer.write(row)
        self._check(reader.path, writer.count)
        counts = self._truncated, self._dropped, self._escaped
        writer.close(Outcome(*counts, self._bad.noted(), self._empty.noted()))

    def _records(self, found: Iterable[Record | ValueError]) -> Iterator[Record]:
        for record in found:
            if isinstance(record, ValueError):
                self._skip(record)
            else:
                yield record

    def _texts(self, records: Iterable[Record]) -> Iterator[Pieces]:
        for text in split_all(records, self._tokenizer, self._template):
            if isinstance(text, ValueError):
                self._skip(text)
                continue
            self._found += 1
            self._escaped += text.escaped
            if text.empty:
                self._empty.add(text.source)
            yield text

    def _examples(self, texts: Iterable[Pieces]) -> Iterator[Example]:
        """The first L tokens of each text."""
        length = self._length
        for tokens, mask, source in tokenize(texts, self._tokenizer, length):
            if mask[:length].any():
                self._truncated += len(tokens) > length
                yield Example(tokens[:length], mask[:length], source)
            else:
                self._dropped += 1

    def _skip(self, error: ValueError) -> None:
        if not self._skip_bad:
            raise error
        self._bad.add(str(error))

    def _check(self, path: str, rows: int) -> None:
        if not self._found:
            count, first = self._bad.noted()
            raise ValueError(f"{path}: all records are bad, {count}. {first[0]}")
        if not rows:
            message = (
                f"{path}: none of {self._found} records has a token to learn within "
                f"max_length {self._length}"
            )
            count, first = self._empty.noted()
            if count:
                message += f"; {count} have an empty answer, the first {first[0]}"
            raise ValueError(message)


class _Notes:
    """Counts records, and keeps messages about the first ones."""

    def __init__(self) -> None:
        self._count = 0
        self._first: list[str] = []

    def add(self, text: str) -> None:
        self._count += 1
        if len(self._first) < _FIRST:
            self._first.append(text)

    def noted(self) -> Noted:
        return Noted(self._count, tuple(self._first))


def _packed(examples: Iterator[Example], length: int) -> Iterator[Row]:
    """As many examples in each row as fit."""
    packed = grain.experimental.FirstFitPackIterDataset(
        _Stream(examples),
        length_struct={"tokens": length, "loss_mask": length},
        meta_features=("loss_mask", "source"),
        num_packing_bins=_BINS,
        shuffle_bins=False,
    )
    for row in packed:
        segments = row["tokens_segment_ids"]
        used = np.count_nonzero(segments)
        lengths = np.bincount(segments[:used])[1:]
        yield Row(row["tokens"][:used], row["loss_mask"][:used], lengths, row["source"])


class _Stream(grain.IterDataset):
    """For Grain: examples that are read once."""

    def __init__(self, examples: Iterator[Example]):
        super().__init__()
        self._examples = examples

    def __iter__(self) -> grain.DatasetIterator:
        return _StreamIterator(self._examples)


class _StreamIterator(grain.DatasetIterator):
    def __init__(self, examples: Iterator[Example]):
        super().__init__()
        self._examples = examples

    def __next__(self) -> dict[str, Any]:
        return next(self._examples)._asdict()

    def get_state(self) -> dict[str, Any]:
        return {}  # nobody resumes from it

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def _cached(path: Path, write: Callable[[Path], None]) -> Dataset:
    """The rows at `path`, written there unless they are, whole and undamaged."""
    digest = path.with_suffix(".sha256")
    path.parent.mkdir(parents=True, exist_ok=True)
    with waiting(path.with_suffix(".lock")) as locked:
        if path.exists() and digest.exists() and digest.read_text() == sha256(path):
            return Dataset(path)
        if locked:  # then nobody is writing what is left from a process that died
            for left in path.parent.glob(f".{path.name}.*"):
                left.unlink(missing_ok=True)
        with replacing(path) as beside, pa.OSFile(str(beside), "wb") as file:
            write(file)
        write_bytes(digest, sha256(path).encode())
        return Dataset(path)


def _key(reader: RecordReader, tokenizer: Tokenizer, arguments: dict[str, Any]) -> str:
    """A digest of all that rows depend on, this code included."""
    code = sorted(Path(__file__).parent.glob("*.py"))
    depends: list[Any] = [(file.name, sha256(file)) for file in code]
    depends += [(name, metadata.version(name)) for name in ("tokenizers", "jinja2")]
    depends += [(str(file), sha256(file)) for file in reader.files]
    depends += [reader.path, reader.digest, arguments]
    depends += [tokenizer.backend.to_str(), tokenizer.bos_id, tokenizer.eos_ids]
    depends += [tokenizer.pad_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be 2 or above, got {max_length}")
