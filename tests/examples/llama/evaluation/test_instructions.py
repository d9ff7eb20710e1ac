"""What obeys each kind of instruction, and a model that is asked."""

import dataclasses

import numpy as np
import pytest

from examples.llama.checkpoints.loading import load_model
from examples.llama.evaluation.answers import Answer, ask
from examples.llama.evaluation.instructions import (
    CHECKS,
    KINDS,
    Check,
    obeyed,
    summary,
)
from examples.llama.model.generation import generate
from examples.llama.text.tokenizer import load_tokenizer

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}!"

# Of each kind a value, answers that obey and answers that do not.
EXAMPLES = {
    "answers and stops": (None, ["I am Bo."], ["", " ..."]),
    "one word": (None, ["Blue.", "sky-blue"], ["It is blue", ""]),
    "yes or no": (None, ["Yes", "no."], ["Yes, it is.", "maybe"]),
    "number": (None, ["7", "1,000.", "2.5"], ["7 days", "seven", ""]),
    "upper case": (None, ["HELLO!"], ["Hello", "", "7"]),
    "lower case": (None, ["cats sleep."], ["Cats sleep.", ""]),
    "in quotes": (None, ['"Emma"', "“Emma”"], ['"Emma" is one', "Emma", '""']),
    "list": (2, ["- a\n- b", "Here:\n1. a\n2) b", "* a\n\n* b"], ["- a", "a, b"]),
    "JSON": (
        "name",
        ['{"name": "Anna"}', '```json\n{"name": 1}\n```'],
        ['Sure: {"name": 1}', '{"Name": 1}', '["name"]', ""],
    ),
    "end": ("The end.", ["It is wet. The end.", '"Wet. The end."'], ["The end. No"]),
    "beginning": ("Sleep", ["Sleep is good", '"Sleep"'], ["I sleep", "My Sleep"]),
    "given word": ("snow", ["The Snow falls."], ["It is snowy."]),
    "most words": (3, ["a b c", "a-b c"], ["a b c d", ""]),
    "sentences": (2, ["A b. C d!", "A? B."], ["A b.", "A. B. C.", "no end"]),
    "repetition": ("Good day", ["good day.", '"Good day"'], ["Good day to you"]),
    "left out": (",!", ["a b."], ["a, b", "a!", ""]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    value, good, bad = EXAMPLES[kind]
    check = Check(kind, "", value)
    for text in good:
        assert check.obeyed(Answer(f"\n{text} ", True)), text
        assert not check.obeyed(Answer(text, False))  # it went on for too long
    for text in bad:
        assert not check.obeyed(Answer(text, True)), text


def test_the_table():
    assert {check.kind for check in CHECKS} == set(KINDS)
    assert len({check.request for check in CHECKS}) == len(CHECKS) >= 40
    for check in CHECKS:  # what a phrase is to be, the request says
        if check.kind in ("end", "beginning", "given word", "JSON", "repetition"):
            assert check.value.lower().rstrip(".") in check.request.lower()


@pytest.fixture(scope="module")
def tokenizer(files):
    return load_tokenizer(files["model"])


@pytest.fixture(scope="module")
def model(files):
    return load_model(files["model"])


def test_ask_in_chat_form_and_plainly(model, tokenizer):
    chat = dataclasses.replace(tokenizer, chat_template=TEMPLATE)
    for asked, text in ((chat, "hi!"), (tokenizer, "Question: hi\nAnswer:")):
        prompt = asked.encode_chat(text).ids
        if asked is tokenizer:
            prompt = [asked.bos_id, *asked.encode(text)]
        new = generate(
            model, np.array([prompt]), max_new_tokens=6, eos_id=asked.eos_ids
        )
        ids = new[0].tolist()
        said = asked.decode(asked.before_end(ids))
        ended = any(token in asked.eos_ids for token in ids)
        if asked is tokenizer:
            said, ended = said.strip().split("\n")[0], ended or "\n" in said.strip()
        longer = "longer, and so after it"
        _, found = ask(model, asked, [longer, "hi"], max_new_tokens=6)
        assert found == Answer(said, ended)


def test_instructions_of_a_model(model, tokenizer, monkeypatch):
    chat = dataclasses.replace(tokenizer, chat_template=TEMPLATE)
    few = (Check("answers and stops", "a"), Check("yes or no", "b"))
    module = "examples.llama.evaluation.instructions"
    monkeypatch.setattr(f"{module}.CHECKS", few)
    monkeypatch.setattr(f"{module}.MAX_NEW_TOKENS", 4)
    found, answers = obeyed(model, chat)
    expected = ask(model, chat, ["a", "b"], max_new_tokens=4)
    assert answers == [answer.text for answer in expected]
    assert found.tolist() == [
        check.obeyed(answer) for check, answer in zip(few, expected, strict=True)
    ]
    counted = summary(np.array([True, False]))
    assert counted["obeyed"] == 0.5
    assert counted["kinds"]["yes or no"] == {"checks": 1, "obeyed": 0.0}
    with pytest.raises(ValueError, match="instructions need a tokenizer with a chat"):
        obeyed(model, tokenizer)
