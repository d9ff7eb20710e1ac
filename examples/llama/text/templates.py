"""Records as tokens, in the paper's template or in the tokenizer's own."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from examples.llama.text.records import Message, Record
from examples.llama.text.tokenizer import Tokenizer

TEMPLATES = ("paper", "tokenizer")
_CHUNK = 1024  # records that are tokenized at the same time


class Piece(NamedTuple):
    """A part of a record's text, of which all tokens count in the loss or none."""

    text: str
    counted: bool = False
    ended: bool = False  # whether the tokenizer's end token comes after it


class Pieces(NamedTuple):
    """A record's text."""

    pieces: list[Piece]
    rendered: bool  # whether the text has its special tokens written out
    source: str


class Example(NamedTuple):
    """A record's tokens."""

    tokens: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]
    source: str


def split(record: Record, tokenizer: Tokenizer, template: str) -> Pieces:
    """Splits a record's text where the loss begins or ends to count.

    Args:
      record: The record.
      tokenizer: Whose end token and template it is.
      template: Of TEMPLATES, for conversations; plain text needs none.

    Raises:
      ValueError: The tokenizer's template refuses the record; the message has its
        source.
    """
    if isinstance(record.content, str):
        text = Piece(record.content, counted=True, ended=True)
        return Pieces([text], rendered=False, source=record.source)
    if template == "paper":
        return Pieces(_paper(record.content), rendered=False, source=record.source)
    try:
        pieces = _rendered(record.content, tokenizer)
    except ValueError as error:
        raise ValueError(f"{record.source}: {error}") from None
    return Pieces(pieces, rendered=True, source=record.source)


def tokenize(texts: Iterable[Pieces], tokenizer: Tokenizer) -> Iterator[Example]:
    """The tokens of texts, whole, and which of them count in the loss.

    The tokens up to a record's first answer are those that encoding this text alone
    gives, as when an answer is to be generated. Text that is not rendered begins with
    the bos token.
    """
    for rendered, group in itertools.groupby(texts, lambda text: text.rendered):
        start = [] if rendered or tokenizer.bos_id is None else [tokenizer.bos_id]
        while chunk := list(itertools.islice(group, _CHUNK)):
            encoded = tokenizer.encode_pieces(
                [[piece.text for piece in text.pieces] for text in chunk], chat=rendered
            )
            for text, parts in zip(chunk, encoded, strict=True):
                tokens, mask = list(start), [False] * len(start)
                for piece, ids in zip(text.pieces, parts, strict=True):
                    if piece.ended:
                        ids = [*ids, tokenizer.eos_ids[0]]
                    counted = _counted(ids, tokenizer) if piece.counted else 0
                    tokens += ids
                    mask += [i < counted for i in range(len(ids))]
                mask[:1] = [False] * len(mask[:1])  # nothing predicts the first one
                yield Example(
                    np.array(tokens, np.int32), np.array(mask, bool), text.source
                )


def _paper(messages: Iterable[Message]) -> list[Piece]:
    pieces, text = [], ""
    for role, turn in messages:
        text += f"<|{role}|>\n"
        if role == "assistant":
            pieces.append(Piece(text))
            pieces.append(Piece(turn, counted=True, ended=True))
            text = "\n"
        else:
            text += f"{turn}\n"
    return [*pieces, Piece(text)]


def _rendered(content: Sequence[Message], tokenizer: Tokenizer) -> list[Piece]:
    for message in content:
        if token := tokenizer.find_special_token(message.content):
            raise ValueError(
                f"a turn of {message.role} has the text {token!r}, which the "
                "tokenizer's template would make a special token; expected other text, "
                "or template paper"
            )
    messages = [message._asdict() for message in content]
    whole = tokenizer.apply_chat_template(messages)
    pieces, end = [], 0
    for i, message in enumerate(content):
        if message.role != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1])
        if not (
            whole.startswith(after) and after.startswith(before) and len(before) >= end
        ):
            raise ValueError(
                f"the chat template has other text for messages 1 to {i + 1} alone "
                "than within the conversation, so that the answers cannot be told; "
                "expected a template that only adds text, or template paper"
            )
        pieces.append(Piece(before[end:]))
        pieces.append(Piece(after[len(before) :], counted=True))
        end = len(after)
    return [*pieces, Piece(whole[end:])]


def _counted(ids: list[int], tokenizer: Tokenizer) -> int:
    """How many of an answer's tokens count: up to its end token, where it has one.

    A template may put more text behind it, such as a line break.
    """
    ends = [i for i, token in enumerate(ids) if token in tokenizer.eos_ids]
    return ends[-1] + 1 if ends else len(ids)
