"""Read a tokenizer from a GGUF file of llama.cpp."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from examples.gguf_files import Header, read_header
from examples.llama.text.llama2c_tokenizer import merges_by_score

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Ends of an answer; a file may name several.
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
SPACE = "\u2581"  # SentencePiece's

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Splitting(NamedTuple):
    """How a byte-level tokenizer cuts text into words, by tokenizer.ggml.pre."""

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    ignore_merges: bool = False  # words that are tokens need no merges
    add_bos: bool = False  # where the file does not say


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _bytes(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


# Those of llama.cpp that Llamas use, by the steps that their tokenizer.json have.
_LLAMA_BPE = Splitting((_split(_LLAMA3), _bytes(False)), True, True)
SPLITTINGS = {
    "default": Splitting(
        (
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(_GPT2),
            _split(r"\p{N}+"),
            _split("[0-9][0-9][0-9]"),
            _bytes(False),
        )
    ),
    "gpt-2": Splitting((_bytes(True),)),
    "smollm": Splitting((pre_tokenizers.Digits(individual_digits=True), _bytes(True))),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
}


def read_gguf_tokenizer(path: Path, vocab_size: int | None) -> dict[str, Any]:
    """Reads the tokenizer in a GGUF file: a byte-level BPE, or SentencePiece's.

    Text is cut as llama.cpp does. Tokens of the types control and unknown are special.
    Every text begins with the bos token, unless the file says not to add one and its
    chat template does not write it.

    Returns:
      The arguments of `examples.llama.text.tokenizer.Tokenizer`.

    Raises:
      OSError, ValueError: See `examples.llama.text.tokenizer.load_tokenizer`.
    """
    header = read_header(path)
    tokens = header.get(_key("tokens"), list)
    if vocab_size is not None and len(tokens) > vocab_size:
        raise ValueError(
            f"{path}: {len(tokens)} tokens, expected no more than the model's "
            f"vocab_size, {vocab_size}"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(vocabulary) < len(tokens):
        twice = {token for i, token in enumerate(tokens) if vocabulary[token] != i}
        raise ValueError(
            f"{path}: {_key('tokens')} must be distinct, got {twice} twice"
        )
    types = _numbers(header, "token_type", len(tokens), NORMAL)

    kind = header.get(_key("model"), str)
    ids: dict[str, int] = {}
    if kind == "gpt2":
        splitting = _splitting(header)
        backend, add_bos = _byte_level(header, vocabulary, splitting), splitting.add_bos
    elif kind == "llama":
        ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        backend, add_bos = _sentencepiece(header, vocabulary, types), True
    else:
        raise ValueError(f"{path}: {_key('model')} must be gpt2 or llama, got {kind!r}")

    for name in ("bos_token_id", "unknown_token_id", "padding_token_id", *END_KEYS):
        if _key(name) in header.metadata:
            ids[name] = header.get(_key(name), int)
        if not 0 <= ids.get(name, 0) < len(tokens):
            raise ValueError(
                f"{path}: {_key(name)} must be 0 to {len(tokens) - 1}, got {ids[name]}"
            )
    special = {i for i, x in enumerate(types) if x in (CONTROL, UNKNOWN)}
    for i, token in enumerate(tokens):
        if i in special or i in ids.values():
            added = AddedToken(token, normalized=False, special=True)
            backend.add_special_tokens([added])
        elif types[i] == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    eos_ids = tuple(dict.fromkeys(ids[name] for name in END_KEYS if name in ids))
    if not eos_ids:
        raise ValueError(f"{path}: no end token, expected {_key(END_KEYS[0])}")
    template = None
    if "tokenizer.chat_template" in header.metadata:
        template = header.get("tokenizer.chat_template", str)
    add_bos = header.get(_key("add_bos_token"), bool, add_bos)
    add_bos = add_bos or "bos_token" in (template or "")
    return {
        "backend": backend,
        "bos_id": ids.get("bos_token_id") if add_bos else None,
        "eos_ids": eos_ids,
        "pad_id": ids.get("padding_token_id", ids.get("unknown_token_id", eos_ids[0])),
        "chat_template": template,
        "template_file": str(path),
    }


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def _numbers(header: Header, name: str, count: int, default: float | None) -> list:
    """A number of each token."""
    if default is not None and _key(name) not in header.metadata:
        return [default] * count
    found = header.get(_key(name), np.ndarray)
    if len(found) != count:
        raise ValueError(
            f"{header.path}: {_key(name)} has {len(found)} values, expected one for "
            f"each of {count} tokens"
        )
    return found.tolist()


def _splitting(header: Header) -> Splitting:
    name = header.get(_key("pre"), str, "default")
    if name not in SPLITTINGS:
        raise ValueError(
            f"{header.path}: {_key('pre')} must be one of {', '.join(SPLITTINGS)}, got "
            f"{name!r}"
        )
    return SPLITTINGS[name]


def _byte_level(
    header: Header, vocabulary: dict[str, int], splitting: Splitting
) -> Tokenizer:
    merges = [tuple(x.split(" ")) for x in header.get(_key("merges"), list)]
    for pair in merges:
        if len(pair) != 2 or not vocabulary.keys() >= {*pair, "".join(pair)}:
            raise ValueError(
                f"{header.path}: {_key('merges')} must be of two tokens that make a "
                f"third, got {' '.join(pair)!r}"
            )
    model = models.BPE(
        vocab=vocabulary, merges=merges, ignore_merges=splitting.ignore_merges
    )
    tokenizer = Tokenizer(model)
    steps = list(splitting.steps)
    one = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.pre_tokenizer = one
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    header: Header, vocabulary: dict[str, int], types: list[int]
) -> Tokenizer:
    scores = _numbers(header, "scores", len(vocabulary), None)
    ordinary = {
        token: scores[i] for token, i in vocabulary.items() if types[i] == NORMAL
    }
    try:
        merges = merges_by_score(ordinary)
    except ValueError as error:
        raise ValueError(f"{header.path}: {_key('scores')}: {error}") from None
    unknown = header.get(_key("unknown_token_id"), int, 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=next((x for x, i in vocabulary.items() if i == unknown), None),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = header.get(_key("add_space_prefix"), bool, True)
    before = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence(
        [*before, normalizers.Replace(" ", SPACE)]
    )
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer
