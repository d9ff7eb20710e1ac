"""Prompts, which are what training has before an answer."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.llama.text.records import Message, Record
from examples.llama.text.templates import prompts, split, tokenize
from examples.llama.text.tokenizer import Tokenizer, load_tokenizer
from tests.examples.llama.checkpoints.llama2c_files import refused
from tests.examples.llama.text.tokenizer_files import (
    CHATML_TEMPLATE,
    write_llama2,
    write_llama3,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """With the templates of Llama 2 and 3, ChatML, and one for llama2's tokenizer."""
    write = {"llama2": write_llama2, "llama3": write_llama3}
    own = {name: load_tokenizer(f(tmp_path_factory.mktemp(name)))
           for name, f in write.items()}  # fmt: skip
    inst = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    inst += "{% if add_generation_prompt %}<s>assistant:{{ ' ' }}{% endif %}"
    return own | {
        "chatml": with_template(own["llama3"], CHATML_TEMPLATE),
        "inst": with_template(own["llama2"], inst),
    }


def with_template(tokenizer, template):
    names = ("backend", "bos_id", "eos_ids", "pad_id")
    return Tokenizer(*(getattr(tokenizer, name) for name in names), template)


def conversation(contents):
    """User and assistant in turns."""
    roles = itertools.cycle(("user", "assistant"))
    return tuple(Message(*pair) for pair in zip(roles, contents, strict=False))


def trained(messages, tokenizer, template):
    (example,) = tokenize(
        [split(Record(messages, "here:1"), tokenizer, template)], tokenizer
    )
    return example.tokens.tolist(), example.loss_mask


def prompt(messages, tokenizer, template="tokenizer"):
    (ids,) = prompts([Record(messages, "here:1")], tokenizer, template)
    assert ids.dtype == np.int32
    return ids.tolist()


SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<s>", "</s>", "<|end_of_text|>"]
talk = st.lists(
    st.sampled_from([*SPECIAL, *" \n\0aé🙂", "the", " answer", "<|user|>\n", "24"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    max_size=8,
).map("".join)
answers = talk.filter(str.strip)  # empty ones do not count


@settings(max_examples=50, deadline=None)
@given(contents=st.tuples(talk, answers, talk, answers))
def test_prompts_are_the_tokens_of_training(tokenizers, contents):
    messages = conversation(contents)
    for name, tokenizer in tokenizers.items():
        for template in ("paper", "tokenizer"):
            tokens, mask = trained(messages, tokenizer, template)
            begins = np.flatnonzero(np.diff(mask.astype(int)) == 1) + 1
            assert len(begins) == 2
            for count, begin in zip((1, 3), begins, strict=True):
                found = prompt(messages[:count], tokenizer, template)
                assert found == tokens[:begin], (name, template)


@settings(max_examples=50, deadline=None)
@given(contents=st.lists(talk, min_size=3, max_size=3))
def test_text_of_a_message_is_never_a_special_token(tokenizers, contents):
    for tokenizer in tokenizers.values():
        named = tokenizer.backend.get_added_tokens_decoder()
        special = {i for i, token in named.items() if token.special}
        found, harmless = (
            [i for i in prompt(conversation(texts), tokenizer) if i in special]
            for texts in (contents, ["a", "a", "a"])
        )
        assert found == harmless


def test_chatml_by_hand(tokenizers):
    tokenizer = tokenizers["chatml"]
    start, end = (
        tokenizer.backend.token_to_id(f"<|im_{x}|>") for x in ("start", "end")
    )
    line = tokenizer.encode("\n")
    assert prompt(conversation(["the", "an", "24"]), tokenizer) == [
        *(start, *tokenizer.encode("user\nthe"), end, *line),
        *(start, *tokenizer.encode("assistant\n"), *tokenizer.encode("an"), end, *line),
        *(start, *tokenizer.encode("user\n24"), end, *line),
        *(start, *tokenizer.encode("assistant\n")),
    ]
    # The same, but that the text "<|im_end|>" is not one token.
    ids = prompt(conversation(["the <|im_end|> an"]), tokenizer)
    assert ids.count(end) == 1
    assert tokenizer.decode(ids) == "user\nthe <|im_end|> an\nassistant\n"


def test_a_system_message(tokenizers):
    messages = (Message("system", "the"), Message("user", "an"))
    tokenizer = tokenizers["chatml"]
    text = tokenizer.decode(prompt(messages, tokenizer))
    assert text == "system\nthe\nuser\nan\nassistant\n"
    text = tokenizer.decode(prompt(messages, tokenizer, "paper"))
    assert text == "<|system|>\nthe\n<|user|>\nan\n<|assistant|>\n"
    with refused(
        "here:1: the chat template fails: TemplateError: roles must alternate"
    ):
        prompt(messages, tokenizers["llama2"])


def test_a_template_that_forgets_what_was_thought(tokenizers):
    """Training could not tell its answers, and generation does not have to."""
    thoughtless = CHATML_TEMPLATE.replace(
        "message['content'] +", "message['content'].split('@')[-1] +"
    ).replace("assistant\n'", "assistant\n@'")
    tokenizer = with_template(tokenizers["chatml"], thoughtless)
    messages = conversation(["a", "the@an <|im_end|>", "24"])
    with refused("so that the answers cannot be told"):
        trained(messages, tokenizer, "tokenizer")
    text = tokenizer.decode(ids := prompt(messages, tokenizer))
    assert text == "user\na\nassistant\nan <|im_end|>\nuser\n24\nassistant\n@"
    assert ids.count(tokenizer.backend.token_to_id("<|im_end|>")) == 3


def test_prompts_of_plain_text(tokenizers):
    for tokenizer in tokenizers.values():
        (ids,) = prompts([Record("the </s>", "here:1")], tokenizer, "paper")
        assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("the </s>")]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML_TEMPLATE, ["<|im_end|>"]),
        (CHATML_TEMPLATE.replace("<|im_end|>", "<|im_end|><|eot_id|>"), ["<|im_end|>"]),
        (CHATML_TEMPLATE.replace("<|im_end|>", "<|eot_id|>"), []),  # known already
        (CHATML_TEMPLATE.replace("<|im_end|>", ""), []),
        (CHATML_TEMPLATE.replace("message['content']", "'x'"), []),
        ("{{ raise_exception('never') }}", []),
        ("{% if %}", []),
        (None, []),
    ],
)  # fmt: skip
def test_end_tokens_that_a_template_names(tokenizers, template, ends):
    before = tokenizers["llama3"]
    after = with_template(before, template)
    assert after.eos_ids[:2] == before.eos_ids
    assert [after.backend.id_to_token(i) for i in after.eos_ids[2:]] == ends
