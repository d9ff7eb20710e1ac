"""Write a tokenizer as GGUF's metadata, which llama.cpp and Ollama tokenize by."""

import itertools
import json
import re
from collections.abc import Iterable
from typing import Any

from examples.llama.text.gguf_tokenizer import (
    BYTE,
    CONTROL,
    END_KEYS,
    NORMAL,
    SPACE,
    SPLITTINGS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Splitting,
)
from examples.llama.text.llama2c_tokenizer import merges_by_score
from examples.llama.text.tokenizer import Tokenizer

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# Whether SentencePiece's kind begins a text with a space, by its normalizers.
_PREFIX = (
    ([{"type": "Prepend", "prepend": SPACE}, _REPLACE], True),
    ([{"type": "Prepend", "prepend": " "}], True),  # llama2.c's
    ([_REPLACE], False),
)


def vocabulary_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The metadata of a tokenizer, by GGUF's keys.

    Args:
      tokenizer: The tokenizer.
      vocab_size: The model's. Ids without a token get a placeholder, as by llama.cpp.

    Raises:
      ValueError: GGUF has no way to say what the tokenizer does.
    """
    state = json.loads(tokenizer.backend.to_str())
    model, added = state["model"], state["added_tokens"]
    if model["type"] != "BPE":
        raise _refusal("model", model["type"], "BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refusal(name, model[name], "none")
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _refusal(
                "added token", token["content"], "no lstrip, rstrip or single_word"
            )
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    if (largest := max(vocabulary.values())) >= vocab_size:
        raise _refusal("largest id", largest, f"less than vocab_size, {vocab_size}")
    by_id = {i: token for token, i in vocabulary.items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [NORMAL if i in by_id else UNUSED for i in range(vocab_size)]
    for token in added:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if model["byte_fallback"]:
        metadata = _sentencepiece(state, tokens, types)
    else:
        metadata = _byte_level(state)
    if len(tokenizer.eos_ids) > len(END_KEYS):
        raise _refusal("end tokens", tokenizer.eos_ids, f"at most {len(END_KEYS)}")
    # With three of these, they need not be what the keys' names say. All end an answer.
    ids = dict(zip(END_KEYS, tokenizer.eos_ids, strict=False))
    ids["padding_token_id"] = tokenizer.pad_id
    if tokenizer.bos_id is not None:
        ids["bos_token_id"] = tokenizer.bos_id
    values = {"tokens": tokens, "token_type": types, **metadata, **ids}
    values["add_bos_token"] = tokenizer.bos_id is not None
    result = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if tokenizer.chat_template is not None:
        result["tokenizer.chat_template"] = tokenizer.chat_template
    return result


def _refusal(what: str, found: Any, allowed: str) -> ValueError:
    return ValueError(
        f"tokenizer: GGUF cannot express its {what} {found!r}, expected {allowed}"
    )


def _steps(state: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The steps of a sequence; of none or a single one, that."""
    steps = [] if state is None else state.get(inside, [state])
    # This changes offsets, and no ids.
    return [{k: v for k, v in x.items() if k != "trim_offsets"} for x in steps]


def _byte_level(state: dict[str, Any]) -> dict[str, Any]:
    """What is particular to a byte-level BPE."""
    if state["normalizer"] is not None:
        raise _refusal("normalizer", state["normalizer"]["type"], "none")
    if (state["decoder"] or {}).get("type") != "ByteLevel":
        raise _refusal("decoder", state["decoder"], "ByteLevel")
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    ignore = state["model"]["ignore_merges"]

    def same(splitting: Splitting) -> bool:
        known = [json.loads(step.__getstate__()) for step in splitting.steps]
        known = _steps({"known": known}, "known")
        return known == steps and splitting.ignore_merges == ignore

    name = next((x for x, splitting in SPLITTINGS.items() if same(splitting)), None)
    if name is None:
        raise _refusal(
            "pre_tokenizer",
            [step["type"] for step in steps],
            f"that of {', '.join(SPLITTINGS)}, with ignore_merges for Llama 3's alone",
        )
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    if any(merge.count(" ") != 1 for merge in merges):
        raise _refusal("merges", "of tokens with spaces", "tokens without")
    return {"model": "gpt2", "pre": name, "merges": merges, "add_space_prefix": False}


def _sentencepiece(
    state: dict[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    """What is particular to SentencePiece's BPE; changes `tokens` and `types` to it."""
    steps = _steps(state["normalizer"], "normalizers")
    prefix = next((prefix for known, prefix in _PREFIX if known == steps), None)
    if prefix is None or state["pre_tokenizer"] is not None:
        raise _refusal(
            "normalizer",
            [step["type"] for step in steps],
            f"Prepend {SPACE!r} and Replace, or Prepend ' ', and no pre_tokenizer",
        )
    if _REPLACE not in steps:
        if any(SPACE in token for token in tokens):
            raise _refusal("token", SPACE, f"none with {SPACE!r}")
        tokens[:] = [token.replace(" ", SPACE) for token in tokens]
    for i, token in enumerate(tokens):
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = BYTE
    if (count := types.count(BYTE)) != 256:
        raise _refusal("tokens of bytes", count, "256")
    unknown = state["model"]["unk_token"]
    if unknown is None:
        raise _refusal("unk_token", unknown, "a token")
    types[tokens.index(unknown)] = UNKNOWN

    merges = [
        [part.replace(" ", SPACE) for part in x] for x in state["model"]["merges"]
    ]
    ordinary = [token for i, token in enumerate(tokens) if types[i] == NORMAL]
    order = {token: i for i, token in enumerate(dict.fromkeys(map("".join, merges)))}
    scores = {token: -float(order.get(token, len(order))) for token in ordinary}
    try:
        expected = _grouped(merges_by_score(scores))
    except ValueError:  # tokens that no merge makes, but could
        expected = []
    # Others are never used, as text has no special tokens.
    used = [pair for pair in merges if scores.keys() >= {*pair, "".join(pair)}]
    if expected != _grouped(used):
        raise _refusal("merges", "of its BPE", "those of SentencePiece's scores")
    return {
        "model": "llama",
        "pre": "default",
        "scores": [scores.get(token, 0.0) for token in tokens],
        "unknown_token_id": tokens.index(unknown),
        "add_space_prefix": prefix,
    }


def _grouped(merges: Iterable[Any]) -> list[tuple[str, set[tuple[str, str]]]]:
    """Each token that is merged, in order, with the pairs that make it."""
    groups = itertools.groupby(map(tuple, merges), "".join)
    return [(token, set(pairs)) for token, pairs in groups]
