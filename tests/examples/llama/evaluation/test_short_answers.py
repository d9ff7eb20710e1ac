"""Questions that a model answers in words."""

import pytest

from examples.llama.checkpoints.loading import load_model
from examples.llama.evaluation.answers import ask
from examples.llama.evaluation.items import Item, Items
from examples.llama.evaluation.short_answers import (
    answered,
    check_questions,
    contains,
)
from examples.llama.text.tokenizer import load_tokenizer
from tests.examples.llama.runs import write_files


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    model = write_files(tmp_path_factory.mktemp("files"))["model"]
    return load_model(model), load_tokenizer(model)


def items_of(*questions, right="a"):
    items = [Item("", (right, "other"), 0, question) for question in questions]
    return Items(tuple(items), "asked.jsonl", {})


def test_contains():
    assert contains("The capital is Bogota, I think.", "Bogotá")
    assert contains("It's PORT-AU-PRINCE", "Port au Prince")
    assert not contains("Romania", "Rome")
    assert not contains("", "Rome")


def test_answered(model_and_tokenizer):
    (said,) = ask(*model_and_tokenizer, ["Where?"], max_new_tokens=24)
    for right, expected in ((said.text, True), ("nowhere at all", False)):
        items = items_of("Where?", right=right)
        assert answered(*model_and_tokenizer, items).tolist() == [expected]


def test_a_question_that_is_too_long(model_and_tokenizer):
    check_questions(*model_and_tokenizer, items_of("Who?"))
    check_questions(*model_and_tokenizer, items_of())
    with pytest.raises(ValueError, match=r"^asked\.jsonl: max_new_tokens 24 and a pro"):
        check_questions(*model_and_tokenizer, items_of("Who?", "Who" * 20))


def test_with_question():
    items = items_of("a", "", "b", "c", "d", "")
    asked = lambda count: [x.question for x in items.with_question(count).items]
    assert asked(None) == asked(4) == asked(9) == ["a", "b", "c", "d"]
    assert asked(2) == ["a", "c"] and asked(1) == ["a"]
