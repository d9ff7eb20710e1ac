"""What the texts start with that a model writes, and where they end."""

import dataclasses

import numpy as np
import pytest

from examples.llama.text.tokenizer import load_tokenizer
from examples.llama.training.own_texts import write_texts
from tests.examples.llama.runs import CONFIG, random_model
from tests.examples.llama.text.tokenizer_files import CHATML_TEMPLATE, write_llama3

LENGTH = 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Of a chat model."""
    root = tmp_path_factory.mktemp("tokenizer")
    write_llama3(root, chat_template=CHATML_TEMPLATE)
    return load_tokenizer(root)


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(CONFIG, vocab_size=416)
    return random_model(config, np.random.default_rng(0))


def test_a_chat_model_writes_conversations(tokenizer, model):
    """A turn's end does not end them."""
    texts = write_texts(model, tokenizer, 40, LENGTH, seed=0)
    start = tokenizer.encode_chat("<|im_start|>user\n").ids
    (turn_end,) = tokenizer.turn_end_ids
    assert turn_end in tokenizer.eos_ids and turn_end == tokenizer.backend.token_to_id(
        "<|im_end|>"
    )
    ends = {*tokenizer.eos_ids} - {turn_end}
    for text in texts:
        assert text[: len(start)] == start
        assert len(text) == LENGTH or text[-1] in ends
        assert not ends & {*text[len(start) : -1]}
    assert any(turn_end in text[:-1] for text in texts)
    assert len({*map(tuple, texts)}) == 40
    assert write_texts(model, tokenizer, 3, LENGTH, seed=0) == texts[:3]


def test_without_a_start_token(tokenizer, model):
    plain = dataclasses.replace(tokenizer, bos_id=None, chat_template=None)
    texts = write_texts(model, plain, 8, LENGTH, seed=0)
    assert {text[0] for text in texts} == {plain.eos_ids[0]}
    assert not any({*plain.eos_ids} & {*text[1:-1]} for text in texts)


def test_the_template_fills_the_text(tokenizer, model):
    start = tokenizer.encode_chat("<|im_start|>user\n").ids
    with pytest.raises(ValueError, match=f"max_length must be above {len(start)}, the"):
        write_texts(model, tokenizer, 1, len(start), seed=0)
    (text,) = write_texts(model, tokenizer, 1, len(start) + 1, seed=0)
    assert text[:-1] == start
