"""Tokenizers in GGUF files: their ids, what is refused, and what is written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.llama.text.gguf_vocabulary import vocabulary_metadata
from examples.llama.text.tokenizer import load_tokenizer
from tests.examples.llama.checkpoints.gguf_files import (
    PIECES,
    sentencepiece_metadata,
    write_gguf,
    write_vocabulary,
)
from tests.examples.llama.checkpoints.llama2c_files import (
    BASE,
    refused,
    write_tokenizer,
)
from tests.examples.llama.text.tokenizer_files import (
    CHATML_TEMPLATE,
    TEXTS,
    write_json,
    write_llama2,
    write_llama3,
)

PARTS = [
    *" \n\0aé🙂",
    "the",
    " answer",
    "</s>",
    "<|eot_id|>",
    "<|user|>\n",
    "  24",
    "'s",
]
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join)


def changed(write, directory, change):
    """A tokenizer whose tokenizer.json `change` has changed."""
    path = write(directory) / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)
    return load_tokenizer(path)


def through(tokenizer, path, extra=0):
    """What comes back of a tokenizer that was written."""
    size = tokenizer.backend.get_vocab_size() + extra
    metadata = vocabulary_metadata(tokenizer, size)
    unused = dict.fromkeys(("tokenizer.ggml.bos_token_id",))
    return load_tokenizer(write_vocabulary(path, unused | metadata), size)


def gpt2(content):
    content["model"]["ignore_merges"] = False
    content["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": True,
    }


def smollm(content):
    gpt2(content)
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


@pytest.fixture(scope="module", params=[gpt2, smollm, lambda content: None])
def byte_level(request, tmp_path_factory):
    """A tokenizer of Hugging Face's files, and what comes back from GGUF."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = changed(write_llama3, path, request.param)
    return tokenizer, through(tokenizer, path / "model.gguf", extra=3)


@given(text=texts)
def test_byte_level(byte_level, text):
    tokenizer, found = byte_level
    assert found.encode(text) == tokenizer.encode(text)
    assert found.encode_chat(text).ids == tokenizer.encode_chat(text).ids
    assert found.decode(found.encode(text)) == text


def test_byte_level_fields(byte_level):
    tokenizer, found = byte_level
    for field in ("bos_id", "eos_ids", "pad_id", "chat_template"):
        assert getattr(found, field) == getattr(tokenizer, field)
    assert len(found.eos_ids) == 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """SentencePiece's kind in GGUF and the same in a llama2.c file."""
    path = tmp_path_factory.mktemp("tokenizer")
    pieces = [piece.replace("▁", " ") for piece in PIECES]
    write_tokenizer(path / "tokenizer.bin", ["<unk>", *BASE, *pieces])
    write_vocabulary(path / "model.gguf", sentencepiece_metadata())
    return load_tokenizer(path / "model.gguf"), load_tokenizer(path / "tokenizer.bin")


@given(text=texts)
def test_sentencepiece(pair, text):
    found, expected = pair
    text = text.replace("<|user|>", "").replace("▁", "")
    assert found.encode(text) == expected.encode(text)
    assert found.decode(found.encode(text)) == text


def test_sentencepiece_tokens(pair):
    found, _ = pair
    assert (found.bos_id, found.eos_ids, found.pad_id) == (1, (2,), 0)
    user = found.backend.token_to_id("<|user|>")
    assert found.encode("a<|user|>")[-1] == user  # a whole token, though not special
    assert found.encode("</s>") != [2] and found.encode_chat("</s>").ids[-1] == 2


def test_sentencepiece_without_space_in_front(tmp_path):
    metadata = sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": False}
    found = load_tokenizer(write_vocabulary(tmp_path / "model.gguf", metadata))
    assert found.encode("the") == [*found.encode("t"), *found.encode("he")]
    assert found.decode(found.encode(" the")) == " the"
    again = through(found, tmp_path / "again.gguf")
    assert again.encode("the  aaa") == found.encode("the  aaa")


@pytest.fixture(scope="module")
def again(pair, tmp_path_factory):
    """What comes back of both."""
    path = tmp_path_factory.mktemp("again") / "model.gguf"
    return [through(tokenizer, path) for tokenizer in pair]


@given(text=texts)
def test_sentencepiece_comes_back(pair, again, text):
    text = text.replace("<|user|>", "").replace("▁", "")
    for tokenizer, found in zip(pair, again, strict=True):
        assert found.encode(text) == tokenizer.encode(text)
        assert (found.bos_id, found.eos_ids, found.pad_id) == (1, (2,), 0)


def test_real_sentencepiece_comes_back(data_dir, stories_tokenizer, tmp_path):
    again = through(stories_tokenizer, tmp_path / "model.gguf")
    text = (data_dir / "tinystories_excerpt.txt").read_text()[:20000]
    assert again.encode(text) == stories_tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "bos_id"),
    [
        ({"add_bos_token": False}, None),
        ({"add_bos_token": True}, 1),
        ({"add_bos_token": None}, None),  # smollm adds none by itself
        ({"add_bos_token": None, "pre": "llama-bpe"}, 1),
        ({"add_bos_token": False, "chat_template": "{{ bos_token }}"}, 1),
    ],
)
def test_bos(tmp_path, changes, bos_id):
    changes = {
        f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": value
        for key, value in changes.items()
    }
    write_gguf(tmp_path / "model.gguf", **changes)
    assert load_tokenizer(tmp_path / "model.gguf").bos_id == bos_id


def test_default_splitting(tmp_path):
    """As llama.cpp cuts text where a file does not say how: punctuation by itself."""
    tokens = ["<end>", *"ab!0123456789Ġ", "a!", "12", "123", "1234", "Ġa"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": None,
        "tokenizer.ggml.merges": ["a !", "1 2", "12 3", "123 4", "Ġ a"],
        "tokenizer.ggml.pre": None,
        **dict.fromkeys(
            f"tokenizer.ggml.{x}_token_id" for x in ("bos", "eos", "padding")
        ),
        "tokenizer.ggml.eos_token_id": 0,
    }
    found = load_tokenizer(write_vocabulary(tmp_path / "model.gguf", metadata))
    names = [found.backend.id_to_token(i) for i in found.encode("a!b 12345 a")]
    assert names == ["a", "!", "b", "Ġ", "123", "4", "5", "Ġa"]
    assert (found.bos_id, found.eos_ids, found.pad_id) == (None, (0,), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model must be gpt2 or llama, got 't5'"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre must be one of default, gpt-2, smollm"),
        ({"tokens": None}, "no key tokenizer.ggml.tokens"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens must be distinct, got {'a'}"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 values, expected one"),
        ({"merges": None}, "no key tokenizer.ggml.merges"),
        ({"merges": ["a b"]}, "tokenizer.ggml.merges must be of two tokens that make"),
        ({"merges": ["abc"]}, "tokenizer.ggml.merges must be of two tokens that make"),
        ({"eos_token_id": None}, "no end token, expected tokenizer.ggml.eos_token_id"),
        ({"eos_token_id": 48}, "tokenizer.ggml.eos_token_id must be 0 to 47, got 48"),
        ({"eos_token_id": "2"}, "tokenizer.ggml.eos_token_id must be of type int, got"),
    ],
)
def test_refused(tmp_path, changes, message):
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    write_gguf(tmp_path / "model.gguf", **changes)
    with refused(f"{tmp_path / 'model.gguf'}: {message}"):
        load_tokenizer(tmp_path / "model.gguf")


def test_too_many_tokens(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    with refused("48 tokens, expected no more than the model's vocab_size, 47"):
        load_tokenizer(tmp_path / "model.gguf", 47)


def test_equal_scores_refused(tmp_path):
    metadata = sentencepiece_metadata(scores=[-1.0] * len(PIECES))
    path = write_vocabulary(tmp_path / "model.gguf", metadata)
    with refused(f"{path}: tokenizer.ggml.scores: tokens '▁▁▁' and '▁▁' have the same"):
        load_tokenizer(path)


def prepend(content):
    content["normalizer"] = {"type": "NFC"}


def pattern(content):
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "a"}


def strip(content):
    content["added_tokens"][0]["lstrip"] = True


def model(content):
    tokens = content["model"]["vocab"]
    content["model"] = {"type": "WordLevel", "vocab": tokens, "unk_token": "a"}


@pytest.mark.parametrize(
    ("write", "change", "message"),
    [
        (write_llama3, prepend, "normalizer 'NFC', expected none"),
        (
            write_llama3,
            pattern,
            "pre_tokenizer ['Split', 'ByteLevel'], expected that of",
        ),
        (write_llama3, strip, "added token '<|begin_of_text|>', expected no lstrip"),
        (write_llama3, model, "model 'WordLevel', expected BPE"),
        (write_llama2, prepend, "normalizer ['NFC'], expected Prepend '▁' and Replace"),
        # Merges of its own training, with fewer splits than SentencePiece would try.
        (
            write_llama2,
            lambda _: None,
            "merges 'of its BPE', expected those of Sentence",
        ),
    ],
)
def test_writing_refused(tmp_path, write, change, message):
    tokenizer = changed(write, tmp_path, change)
    with refused(f"tokenizer: GGUF cannot express its {message}"):
        vocabulary_metadata(tokenizer, 1000)


def test_writing_refuses_ids(tmp_path):
    tokenizer = load_tokenizer(write_llama3(tmp_path, chat_template=CHATML_TEMPLATE))
    size = tokenizer.backend.get_vocab_size()
    with refused(
        f"its largest id {size - 1}, expected less than vocab_size, {size - 1}"
    ):
        vocabulary_metadata(tokenizer, size - 1)
    assert tokenizer.encode(TEXTS[0])
