"""Records as tokens, in the paper's template or in the tokenizer's own."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from examples.llama.text.guard import APART
from examples.llama.text.records import Message, Record, is_empty
from examples.llama.text.rendering import Chat
from examples.llama.text.tokenizer import Tokenizer

TEMPLATES = ("paper", "tokenizer")
# Records that are tokenized at the same time, and about how many characters they have.
_CHUNK = 1024
_CHARACTERS = 1 << 22
_CHARACTERS_PER_TOKEN = 64  # hardly a text has so many


class Piece(NamedTuple):
    """A part of a record's text. Either all its tokens count in the loss, or none."""

    text: str
    counted: bool = False
    ended: bool = False  # whether the tokenizer's end token comes after it


class Pieces(NamedTuple):
    """A record's text."""

    pieces: list[Piece]
    rendered: bool  # whether the text has its special tokens written out
    source: str
    # Whether its text somewhere reads like a special token, or in a conversation like a
    # mark of a turn. It stays text.
    escaped: bool = False
    empty: bool = False  # whether an answer is empty


class Example(NamedTuple):
    """A record's tokens."""

    tokens: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]
    source: str


def split(
    record: Record, tokenizer: Tokenizer, template: str, *, prompt: bool = False
) -> Pieces:
    """Splits a record's text where the loss begins or ends to count.

    No text of a message makes a turn; see `text.guard`. In plain text only special
    tokens are kept from it, as it has no turns: it may itself be a conversation that
    someone wrote out.

    An empty answer does not count, nor does its end token: it would teach a model to
    stop at once.

    Args:
      record: The record.
      tokenizer: Whose end token and template it is.
      template: Of TEMPLATES, for conversations; plain text needs none.
      prompt: Whether this is a prompt: the model continues a conversation with its
        next answer, and plain text where it stops.

    Raises:
      ValueError: The tokenizer's template refuses the record; the message has its
        source.
    """
    (pieces,) = split_all([record], tokenizer, template, prompt=prompt)
    if isinstance(pieces, ValueError):
        raise pieces
    return pieces


def split_all(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    template: str,
    *,
    prompt: bool = False,
) -> Iterator[Pieces | ValueError]:
    """As `split`, of many records; the error of each that the template refuses.

    It takes less time than one by one.
    """
    remaining = iter(records)
    while chunk := list(itertools.islice(remaining, _CHUNK)):
        contents = [_as_text(record, tokenizer, template) for record in chunk]
        chats = [
            _chat(content, prompt)
            for content in contents
            if isinstance(content, tuple) and template == "tokenizer"
        ]
        texts = iter(tokenizer.render_chats(chats))
        for record, content in zip(chunk, contents, strict=True):
            before, source = record
            try:
                if isinstance(content, ValueError):
                    raise content
                rendered = isinstance(content, tuple) and template == "tokenizer"
                if isinstance(content, str):
                    counted = not is_empty(content)
                    pieces = [Piece(content, counted, ended=not prompt)]
                elif rendered:
                    pieces = _parted(_rendered(content, next(texts), prompt))
                else:
                    pieces = _parted(_paper(content, prompt))
            except ValueError as error:
                yield ValueError(f"{source}: {error}")
            else:
                escaped = content != before or _special(before, tokenizer)
                yield Pieces(pieces, rendered, source, escaped, record.has_empty_answer)


def tokenize(
    texts: Iterable[Pieces], tokenizer: Tokenizer, length: int | None = None
) -> Iterator[Example]:
    """The tokens of texts, and which of them count in the loss.

    The tokens up to a record's first answer are those that encoding this text alone
    gives, as when an answer is to be generated. Text that is not rendered begins with
    the bos token.

    Args:
      texts: The texts.
      tokenizer: The model's.
      length: How many tokens of each text are wanted; by default all. Those of a longer
        text are still more than that, but not all: what lies far behind is left out
        before the text is tokenized, so that it takes no memory.
    """
    most = math.inf
    if length is not None:
        most = max(length, 1024) * _CHARACTERS_PER_TOKEN
    for rendered, group in itertools.groupby(texts, lambda text: text.rendered):
        for chunk in _chunks(group, most):
            short = [_shortened(text, most) for text in chunk]
            examples = _encoded(short, rendered, tokenizer)
            for whole, text, example in zip(chunk, short, examples, strict=True):
                # A text may have few tokens for its characters.
                if text is not whole and len(example.tokens) < 2 * (length or 0):
                    (example,) = _encoded([whole], rendered, tokenizer)
                yield example


def _chunks(texts: Iterable[Pieces], most: float) -> Iterator[list[Pieces]]:
    """The texts in lists that take little memory to tokenize."""
    chunk: list[Pieces] = []
    characters: float = 0
    for text in texts:
        chunk.append(text)
        characters += min(most, sum(len(piece.text) for piece in text.pieces))
        if len(chunk) == _CHUNK or characters >= _CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _shortened(text: Pieces, most: float) -> Pieces:
    """The text's first `most` characters; itself where it has no more."""
    ends = itertools.accumulate(len(piece.text) for piece in text.pieces)
    for i, end in enumerate(ends):
        if end > most:
            last = text.pieces[i]
            kept = len(last.text) - int(end - most)
            last = Piece(last.text[:kept], last.counted)
            return text._replace(pieces=[*text.pieces[:i], last])
    return text


def _encoded(
    texts: Sequence[Pieces], rendered: bool, tokenizer: Tokenizer
) -> Iterator[Example]:
    start = [] if rendered or tokenizer.bos_id is None else [tokenizer.bos_id]
    encoded = tokenizer.encode_pieces(
        [[piece.text for piece in text.pieces] for text in texts], chat=rendered
    )
    for text, parts in zip(texts, encoded, strict=True):
        tokens, mask = list(start), [False] * len(start)
        for piece, ids in zip(text.pieces, parts, strict=True):
            if piece.ended:
                ids = [*ids, tokenizer.eos_ids[0]]
            counted = _counted(ids, tokenizer) if piece.counted else 0
            tokens += ids
            mask += [True] * counted + [False] * (len(ids) - counted)
        mask[:1] = [False] * len(mask[:1])  # nothing predicts the first one
        yield Example(np.array(tokens, np.int32), np.array(mask, bool), text.source)


def prompts(
    records: Iterable[Record], tokenizer: Tokenizer, template: str
) -> list[np.ndarray]:
    """The tokens that a model is to continue, as it saw them in training.

    Args:
      records: Conversations, to be continued by an answer; or plain texts, to be
        continued where they stop.
      tokenizer: The model's.
      template: Of TEMPLATES.

    Returns:
      int32 [T] for each record.

    Raises:
      ValueError: See `split`.
    """
    texts = []
    for pieces in split_all(records, tokenizer, template, prompt=True):
        if isinstance(pieces, ValueError):
            raise pieces
        texts.append(pieces)
    return [example.tokens for example in tokenize(texts, tokenizer)]


def _paper(messages: Iterable[Message], prompt: bool) -> list[Piece]:
    pieces, text = [], ""
    for role, turn in messages:
        text += f"<|{role}|>\n"
        if role == "assistant":
            pieces.append(Piece(text))
            pieces.append(Piece(turn, counted=not is_empty(turn), ended=True))
            text = "\n"
        else:
            text += f"{turn}\n"
    if prompt:
        text += "<|assistant|>\n"
    return [*pieces, Piece(text)]


def _as_text(
    record: Record, tokenizer: Tokenizer, template: str
) -> tuple[Message, ...] | str | ValueError:
    """The record's content, in which no text of a message makes a turn."""
    if isinstance(record.content, str):
        return record.content
    try:
        return tuple(
            Message(role, tokenizer.as_text(role, text, template))
            for role, text in record.content
        )
    except ValueError as error:
        return error


def _special(content: tuple[Message, ...] | str, tokenizer: Tokenizer) -> bool:
    """Whether anything reads like a special token."""
    texts = [content] if isinstance(content, str) else [text for _, text in content]
    return any(tokenizer.find_special_token(text) is not None for text in texts)


def _chat(content: Sequence[Message], prompt: bool) -> Chat:
    """What to render of a conversation: all of it, and up to and with each answer."""
    wanted = [(len(content), prompt)]
    for i, message in enumerate(content):
        if message.role == "assistant":
            wanted += [(i, True), (i + 1, False)]
    return Chat([message._asdict() for message in content], wanted)


def _rendered(
    content: Sequence[Message], texts: list[str] | ValueError, prompt: bool
) -> list[Piece]:
    """The pieces of a conversation, from the texts that `_chat` wants."""
    if isinstance(texts, ValueError):
        raise texts
    answers = [i for i, message in enumerate(content) if message.role == "assistant"]
    whole, *parts = texts
    pieces: list[Piece] = []
    end = 0
    for i, before, after in zip(answers, parts[::2], parts[1::2], strict=True):
        if not (
            whole.startswith(after) and after.startswith(before) and len(before) >= end
        ):
            if prompt:  # nothing counts, so no answer has to be told
                return [Piece(whole)]
            raise ValueError(
                f"the chat template has other text for messages 1 to {i + 1} alone "
                "than within the conversation, so that the answers cannot be told; "
                "expected a template that only adds text, or template paper"
            )
        pieces.append(Piece(before[end:]))
        counted = not is_empty(content[i].content)
        pieces.append(Piece(after[len(before) :], counted=counted))
        end = len(after)
    return [*pieces, Piece(whole[end:])]


def _parted(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces in the parts that `text.guard` makes."""
    found = []
    for text, counted, ended in pieces:
        *first, last = text.split(APART)
        found += [Piece(part, counted) for part in first]
        found.append(Piece(last, counted, ended))
    return found


def _counted(ids: list[int], tokenizer: Tokenizer) -> int:
    """How many of an answer's tokens count: up to its end token, where it has one.

    A template may put more text behind it, such as a line break.
    """
    ends = (n for n in range(len(ids), 0, -1) if ids[n - 1] in tokenizer.eos_ids)
    return next(ends, len(ids))
