"""Records to learn from: JSON lines of the usual formats, as conversations."""

import codecs
import collections
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from examples.llama.text.sources import HUB, find_files

ROLES = ("system", "user", "assistant")
_REPEATED = object()  # the value of a field that a JSON object has more than once

# Fields that one turn of a user and an assistant come from, and whose format it is.
_PAIRS = (
    ("question", "answer"),  # GSM8K
    ("instruction", "output"),  # Alpaca, with an "input" at times
    ("query", "response"),  # MetaMathQA
    ("prompt", "answer"),  # TRACE
)
_ALLOWED = (
    "expected a JSON object with "
    + ", ".join(f'"{user}" and "{assistant}"' for user, assistant in _PAIRS)
    + ', "messages", or "text"'
)


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # of ROLES
    content: str


class Record(NamedTuple):
    """What one line holds."""

    content: tuple[Message, ...] | str  # a conversation, or plain text
    source: str  # "file:line", or "file:number" where it is no file of lines

    @property
    def has_empty_answer(self) -> bool:
        """Whether an answer, or the plain text, is empty or nothing but whitespace."""
        if isinstance(self.content, str):
            return is_empty(self.content)
        return any(
            message.role == "assistant" and is_empty(message.content)
            for message in self.content
        )


def is_empty(text: str) -> bool:
    """Whether there is nothing to learn in a text: no character but whitespace."""
    return not text.strip()


class Records(NamedTuple):
    """What a file holds."""

    records: list[Record]
    bad: list[str]  # why the others were skipped, each with its file and line


def read_records(path: str | os.PathLike[str], *, skip_bad: bool = False) -> Records:
    """Reads all records that a path names; see `RecordReader`.

    Args:
      path: As for `RecordReader`.
      skip_bad: Whether to skip malformed records instead of stopping at the first.

    Returns:
      The records, and why others were skipped.

    Raises:
      OSError: A file cannot be read.
      ValueError: A record is malformed, or there is none; the message has the file,
        the line (or the record's number from 1), and what is allowed.
    """
    records: list[Record] = []
    bad: list[str] = []
    for found in RecordReader(path):
        if isinstance(found, Record):
            records.append(found)
        elif skip_bad:
            bad.append(str(found))
        else:
            raise found
    if not records:
        raise ValueError(f"{path}: all records are bad, {len(bad)}. {bad[0]}")
    return Records(records, bad)


class RecordReader:
    """Reads records one by one, each in the format that its fields tell.

    GSM8K has "question" and "answer", Alpaca "instruction", "output" and perhaps
    "input" (which stands on a new line after the instruction, as in LLaMA-Factory),
    MetaMathQA "query" and "response", TRACE "prompt" and "answer". Chats have
    "messages" of a "role" (system, user or assistant) and a "content", and plain text
    has "text". Other fields are ignored. A record is malformed where a field that is
    read is there more than once.

    An iteration gives each record, or the ValueError that says what is wrong with it,
    with its file and line (or the record's number from 1), and what is allowed. It
    raises ValueError where there is none.

    Args:
      path: See `text.sources.find_files`; or "hf:NAME[:CONFIG][:SPLIT]", a name or
        directory that `datasets.load_dataset` takes, with the split "train" by default.
        A file has JSON lines, among which blank ones are ignored; or, if it is called
        .json, one JSON list, which is read as a whole.

    Attributes:
      files: The files that are read; none of a data set's.
      size: How many bytes there are to read.
      done: How many have been read.
      digest: A data set's fingerprint, which changes with its content; None for files.

    Raises:
      OSError: A file is not there.
      ValueError: The path names no file, or no data set that can be loaded.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self.done = 0
        self.digest: str | None = None
        self.files = find_files(self.path)
        self._dataset: Any = None
        if self.path.startswith(HUB):
            self._dataset = _load_dataset(self.path)
            self.size = self._dataset.data.nbytes
            self.digest = self._dataset._fingerprint
        else:
            self.size = sum(file.stat().st_size for file in self.files)

    def __iter__(self) -> Iterator[Record | ValueError]:
        self.done, count = 0, 0
        for name, kind, values in self._values():
            for number, value in values:
                count += 1
                try:
                    if isinstance(value, bytes):
                        value = _parsed(value.decode().rstrip())
                    content = _content(value)
                except (ValueError, RecursionError) as error:
                    where = f"{name}, {kind} {number}"
                    yield ValueError(f"{where}: {_problem(error)}; {_ALLOWED}")
                else:
                    yield Record(content, f"{name}:{number}")
        if not count:
            raise ValueError(f"{name}, {kind} 1: no record in the file; {_ALLOWED}")

    def _values(self) -> Iterator[tuple[str, str, Iterator[tuple[int, Any]]]]:
        """Yields each file's name, what its values are, and its numbered values."""
        if self._dataset is not None:
            yield self.path, "record", self._rows()
        for file in self.files:
            name, values = str(file), None
            if file.suffix.lower() == ".json":
                values = _json_list(name)
            if values is None:
                yield name, "line", self._lines(file)
            else:
                yield name, "record", values
                self.done += file.stat().st_size

    def _rows(self) -> Iterator[tuple[int, Any]]:
        for number, value in enumerate(self._dataset, start=1):
            self.done = self.size * number // len(self._dataset)
            yield number, value

    def _lines(self, path: Path) -> Iterator[tuple[int, bytes]]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                self.done += len(line)
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # of Windows' editors
                if line.strip():
                    yield number, line


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file, its line breaks as they are.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is not UTF-8; the message has the line.
    """
    data = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: {error}; expected UTF-8") from None


def _json_list(path: str) -> Iterator[tuple[int, Any]] | None:
    """A JSON list's values, or None where the file begins otherwise."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return None
    try:
        return iter(enumerate(_parsed(text), start=1))
    except (ValueError, RecursionError) as error:
        where = f"{path}, line {getattr(error, 'lineno', 1)}"
        raise ValueError(f"{where}: {_problem(error)}; expected a JSON list") from None


def _parsed(text: str) -> Any:
    """The JSON value; a field that an object has more than once is _REPEATED."""
    return json.loads(text, object_pairs_hook=_object)


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(fields)
    if len(found) < len(fields):
        times = collections.Counter(name for name, _ in fields)
        found |= {name: _REPEATED for name in found if times[name] > 1}
    return found


def _problem(error: Exception) -> str:
    """The error's message without JSON's line, which counts within a line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def _load_dataset(path: str) -> Any:
    """A data set of the library `datasets`, whose rows stay on disk."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{path}: needs `pip install datasets`") from None
    name, config, split = (*path.removeprefix(HUB).split(":", 2), "", "")[:3]
    if not name:
        raise ValueError(
            f"{path!r} names no data set; expected hf:NAME[:CONFIG][:SPLIT]"
        )
    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except OSError:
        raise
    except Exception as error:  # it has many kinds
        raise ValueError(
            f"{path}: {error}; expected hf:NAME[:CONFIG][:SPLIT]"
        ) from None


def _content(value: Any) -> tuple[Message, ...] | str:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} found")
    if "messages" in value:
        return _messages(value["messages"])
    for user, assistant in _PAIRS:
        if user in value and assistant in value:
            question, answer = _text(value, user), _text(value, assistant)
            # Alpaca has an empty one where there is none, and some copies null.
            if user == "instruction" and value.get("input") not in (None, ""):
                question += "\n" + _text(value, "input")
            return Message("user", question), Message("assistant", answer)
    if "text" in value:
        return _text(value, "text")
    for user, assistant in _PAIRS:
        if user in value:
            raise ValueError(f'"{assistant}" is missing')
    raise ValueError(f"fields {list(value)!s:.200} found")


def _messages(values: Any) -> tuple[Message, ...]:
    if not isinstance(values, list):
        raise ValueError(_not_allowed("messages", values))
    messages = []
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise ValueError(f"message {number} is {type(value).__name__}")
        try:
            message = Message(_text(value, "role"), _text(value, "content"))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
        if message.role not in ROLES:
            raise ValueError(
                f"message {number}: role is {message.role!r:.50}, not one of "
                + ", ".join(ROLES)
            )
        messages.append(message)
    if not any(message.role == "assistant" for message in messages):
        raise ValueError('"messages" has no turn of an assistant')
    return tuple(messages)


def _text(value: dict[str, Any], field: str) -> str:
    if field not in value:
        raise ValueError(f'"{field}" is missing')
    text = value[field]
    if not isinstance(text, str):
        raise ValueError(_not_allowed(field, text))
    text.encode()  # JSON can escape one half of a surrogate pair
    return text


def _not_allowed(field: str, value: Any) -> str:
    if value is _REPEATED:
        return f'"{field}" is there more than once'
    return f'"{field}" is {type(value).__name__}'
