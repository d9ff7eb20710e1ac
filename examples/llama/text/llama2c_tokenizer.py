"""Read llama2.c's tokenizer format."""

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

_SPECIAL = ["<unk>", "<s>", "</s>"]  # of the ids 0, 1 and 2
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_FIRST_PIECE = len(_SPECIAL) + len(_BYTES)


def load_llama2c_tokenizer(
    path: str | os.PathLike[str], vocab_size: int | None = None
) -> Tokenizer:
    """Loads a llama2.c tokenizer file as a tokenizer that gives the same ids.

    ``<unk>``, ``<s>`` and ``</s>`` are registered as special tokens.

    Args:
      path: The file.
      vocab_size: The number of tokens that it must have, where that is known.

    Raises:
      OSError: The file cannot be read.
      ValueError: The file is not such a tokenizer, is damaged, or has another number
        of tokens.
    """
    pieces, scores = _read_llama2c_tokenizer(Path(path), vocab_size)
    ordinary = zip(pieces[_FIRST_PIECE:], scores[_FIRST_PIECE:], strict=True)
    try:
        merges = merges_by_score(dict(ordinary))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token=_SPECIAL[0],
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in _SPECIAL]
    )
    return tokenizer


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that give the same tokens as scores do, the first one first.

    By scores, the adjacent pair goes first whose merged token scores highest. Equal
    scores would be a tie between the pairs of two tokens, which goes to the pair
    further left, and merge ranks cannot do that.

    Args:
      scores: Of the ordinary tokens, which alone take part.

    Raises:
      ValueError: Two tokens that are made by merging have the same score.
    """
    merges: list[tuple[str, str]] = []
    merged: dict[float, str] = {}
    for score, piece in sorted(((s, p) for p, s in scores.items()), reverse=True):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [pair for pair in splits if pair[0] in scores and pair[1] in scores]
        if splits and merged.setdefault(score, piece) != piece:
            raise ValueError(
                f"tokens {merged[score]!r} and {piece!r} have the same score, {score}; "
                "expected distinct scores"
            )
        merges += splits
    return merges


def _read_llama2c_tokenizer(
    path: Path, vocab_size: int | None
) -> tuple[list[str], list[float]]:
    """The tokens, special ones by their usual names, and their scores."""
    data = path.read_bytes()
    if len(data) < 4:
        raise ValueError(f"{path}: {len(data)} bytes, expected 4 or more")
    (longest,) = struct.unpack_from("<i", data)
    if not 1 <= longest <= 1 << 16:
        raise ValueError(
            f"{path}: longest token length is {longest}, expected 1 to {1 << 16}: not "
            "a llama2.c tokenizer"
        )
    pieces: list[str] = []
    scores: list[float] = []
    offset = 4
    while offset < len(data):
        token = f"{path}: token {len(pieces)} at byte {offset}"
        if offset + 8 > len(data):
            raise ValueError(f"{token} is truncated, the file has {len(data)} bytes")
        score, length = struct.unpack_from("<fi", data, offset)
        if not (0 <= length <= longest and math.isfinite(score)):
            raise ValueError(
                f"{token} has length {length} and score {score}, expected 0 to "
                f"{longest} and a number: not a llama2.c tokenizer"
            )
        offset += 8 + length
        if offset > len(data):
            raise ValueError(f"{token} is truncated, the file has {len(data)} bytes")
        try:
            pieces.append(data[offset - length : offset].decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{token} is not UTF-8: {error}") from None
        scores.append(score)
    if vocab_size is not None and len(pieces) != vocab_size:
        raise ValueError(
            f"{path}: {len(pieces)} tokens, expected the model's vocab_size, "
            f"{vocab_size}"
        )
    pieces[: len(_SPECIAL)] = _SPECIAL  # llama2.c has line breaks around <s>
    expected = [*_SPECIAL, *_BYTES]
    for i, piece in enumerate(expected):
        if i >= len(pieces) or pieces[i] != piece:
            found = repr(pieces[i]) if i < len(pieces) else "missing"
            raise ValueError(f"{path}: token {i} is {found}, expected {piece!r}")
    if len(set(pieces)) < len(pieces):
        twice = next(piece for piece in pieces if pieces.count(piece) > 1)
        raise ValueError(f"{path}: token {twice!r} occurs twice")
    return pieces, scores
