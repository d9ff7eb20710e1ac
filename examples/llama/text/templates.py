"""Records as tokens, in the paper's template or in the tokenizer's own."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from examples.llama.text.records import Message, Record, is_empty
from examples.llama.text.tokenizer import Tokenizer

TEMPLATES = ("paper", "tokenizer")
_CHUNK = 1024  # records that are tokenized at the same time
# Parts text that reads like a special token, so that it stays text. Unicode keeps these
# characters free for uses such as this one.
_APART = "\ufdd0\ufdd1"


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


class Example(NamedTuple):
    """A record's tokens."""

    tokens: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]
    source: str


def split(
    record: Record, tokenizer: Tokenizer, template: str, *, prompt: bool = False
) -> Pieces:
    """Splits a record's text where the loss begins or ends to count.

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
    if isinstance(record.content, str):
        counted = not is_empty(record.content)
        text = Piece(record.content, counted=counted, ended=not prompt)
        return Pieces([text], rendered=False, source=record.source)
    if template == "paper":
        pieces = _paper(record.content, prompt)
        return Pieces(pieces, rendered=False, source=record.source)
    try:
        pieces = _rendered(record.content, tokenizer, prompt)
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
    texts = [split(record, tokenizer, template, prompt=True) for record in records]
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


def _rendered(
    content: Sequence[Message], tokenizer: Tokenizer, prompt: bool
) -> list[Piece]:
    messages = [
        {"role": message.role, "content": _parted(message.content, tokenizer)}
        for message in content
    ]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)
    pieces: list[Piece] = []
    end = 0
    for i, message in enumerate(content):
        if message.role != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1])
        if not (
            whole.startswith(after) and after.startswith(before) and len(before) >= end
        ):
            if prompt:  # nothing counts, so no answer has to be told
                pieces, end = [], 0
                break
            raise ValueError(
                f"the chat template has other text for messages 1 to {i + 1} alone "
                "than within the conversation, so that the answers cannot be told; "
                "expected a template that only adds text, or template paper"
            )
        pieces.append(Piece(before[end:]))
        counted = not is_empty(message.content)
        pieces.append(Piece(after[len(before) :], counted=counted))
        end = len(after)
    return [
        Piece(part, piece.counted)
        for piece in [*pieces, Piece(whole[end:])]
        for part in piece.text.split(_APART)
    ]


def _parted(text: str, tokenizer: Tokenizer) -> str:
    """The text with _APART inside of all that reads like a special token."""
    while token := tokenizer.find_special_token(text):
        if len(token) == 1:
            raise ValueError(
                f"a message has the text {token!r}, which the tokenizer's template "
                "makes a special token; expected other text, or template paper"
            )
        text = text.replace(token, token[0] + _APART + token[1:])
    return text


def _counted(ids: list[int], tokenizer: Tokenizer) -> int:
    """How many of an answer's tokens count: up to its end token, where it has one.

    A template may put more text behind it, such as a line break.
    """
    ends = [i for i, token in enumerate(ids) if token in tokenizer.eos_ids]
    return ends[-1] + 1 if ends else len(ids)
