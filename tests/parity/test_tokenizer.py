"""Tokenizers against transformers' own loading of the same files."""

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.llama.text.records import Message, Record
from examples.llama.text.templates import prompts, split, tokenize
from examples.llama.text.tokenizer import load_tokenizer, save_tokenizer
from tests.examples.llama.checkpoints.llama2c_files import BASE, write_tokenizer
from tests.examples.llama.text.tokenizer_files import (
    CHATML_TEMPLATE,
    TEXTS,
    write_llama2,
    write_llama3,
)

PARTS = [*" \n\0aé🙂", "the", " answer", "</s>", "<|eot_id|>", "<unk>", "<|user|>\n"]
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join)


def write_llama2c(directory):
    pieces = ["<unk>", *BASE, *" \ntheansw", "th", " a", "the", "an"]
    return write_tokenizer(directory / "tokenizer.bin", pieces)


@pytest.fixture(scope="module", params=[write_llama2, write_llama3, write_llama2c])
def saved(request, tmp_path_factory):
    """Ours, and transformers' of what we saved."""
    tokenizer = load_tokenizer(request.param(tmp_path_factory.mktemp("source")))
    path = tmp_path_factory.mktemp("saved")
    save_tokenizer(tokenizer, path)
    # As in a checkpoint, where the model's type must not choose another tokenizer.
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tokenizer, transformers.AutoTokenizer.from_pretrained(path)


@settings(max_examples=200)
@given(text=texts)
def test_saved_gives_the_same_ids(saved, text):
    ours, theirs = saved
    with_special = theirs(text).input_ids
    assert with_special == [ours.bos_id, *ours.encode_chat(text).ids]
    assert theirs(text, split_special_tokens=True).input_ids[1:] == ours.encode(text)
    ids = ours.encode(text)
    assert theirs.decode([ours.bos_id, *ids], skip_special_tokens=True) == text


def test_saved_names_the_same_tokens(saved):
    ours, theirs = saved
    assert theirs.bos_token_id == ours.bos_id
    assert theirs.eos_token_id == ours.eos_ids[0]
    assert theirs.pad_token_id == ours.pad_id
    pair = theirs("the", "an").input_ids
    assert pair.count(ours.bos_id) == 2


@pytest.mark.parametrize("write", [write_llama2, write_llama3])
def test_source_gives_the_same_ids(write, tmp_path):
    """transformers' of the source, before we saved anything."""
    path = write(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    ours = load_tokenizer(path)
    for text in TEXTS:
        assert theirs(text).input_ids == [ours.bos_id, *ours.encode_chat(text).ids]


@pytest.mark.parametrize(
    ("write", "template"),
    [(write_llama2, None), (write_llama3, None), (write_llama3, CHATML_TEMPLATE)],
)
def test_chat(write, template, tmp_path):
    path = write(tmp_path, **({"chat_template": template} if template else {}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    ours = load_tokenizer(path)
    chat = [
        {"role": role, "content": content}
        for role, content in [
            ("user", " the <answer> é\n"),
            ("assistant", "\nan\n other"),
            ("user", "24"),
            ("assistant", "{} 🙂"),
        ]
    ]
    options = {"add_generation_prompt": True, "return_dict": False}
    for count in (1, 3):
        # With answers that begin as templates have it, else a token would reach from
        # the template into the answer, which is never so where a model writes it.
        plain = [x | {"content": x["content"].strip()} for x in chat[:count]]
        record = Record(tuple(Message(**x) for x in plain), "here:1")
        (ids,) = prompts([record], ours, "tokenizer")
        assert ids.tolist() == theirs.apply_chat_template(plain, **options)
    for messages, prompt in ((chat[:1], True), (chat[:3], True), (chat, False)):
        text = ours.apply_chat_template(messages, add_generation_prompt=prompt)
        options = {"add_generation_prompt": prompt, "return_dict": False}
        assert text == theirs.apply_chat_template(messages, tokenize=False, **options)
        ids = ours.encode_chat(text).ids
        assert ids == theirs.apply_chat_template(messages, **options)


@pytest.mark.parametrize("write", [write_llama2, write_llama3])
def test_training_tokens(write, tmp_path):
    """Of a conversation in pieces, and from a template with marks."""
    end = {write_llama2: "</s>", write_llama3: "<|eot_id|>"}[write]
    marked = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '[' + message['role'] + ']\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '" + end + "' }}{% endgeneration %}\n"
        "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
    )
    path = write(tmp_path, chat_template=marked)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    ours = load_tokenizer(path)
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    contents = ["be kind", TEXTS[0], "the answer\n", TEXTS[1], "24 é 🙂", "and?"]
    messages = [Message(*pair) for pair in zip(roles, contents, strict=True)]
    pieces = split(Record(tuple(messages), "here:1"), ours, "tokenizer")
    (example,) = tokenize([pieces], ours)
    chat = [message._asdict() for message in messages]
    expected = theirs.apply_chat_template(chat, return_dict=False)
    assert example.tokens.tolist() == expected
    # Not beside transformers' own mask, which is off where a token begins with a space.
    answers = [m.content for m in messages if m.role == "assistant"]
    counted = theirs.decode(example.tokens[example.loss_mask])
    assert counted == "".join(answer + end for answer in answers)
