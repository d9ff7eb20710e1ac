"""Items of files, and those that packages make."""

import json

import pytest

from examples.llama.evaluation.questions import load_items

GOOD = {"prompt": "The sky is", "choices": ["blue", "red"], "answer": "blue"}


def write(path, *values):
    path.write_text("\n".join(json.dumps(value) for value in values))
    return str(path)


def test_items_of_a_file(tmp_path):
    asked = {"question": "Is it?", "choices": ["no", "yes", "so"], "answer": "yes"}
    path = write(tmp_path / "own.jsonl", GOOD, asked | {"relation": "odd"})
    found = load_items(path)
    first, second = found.items
    assert (first.prompt, first.right, first.question) == ("The sky is", "blue", "")
    assert second.prompt == "Question: Is it?\nAnswer:"
    assert (second.answer, second.relation) == (1, "odd")
    assert found.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    described = found.describe()
    assert (described["source"], described["items"]) == ("own.jsonl", 2)
    other = load_items(write(tmp_path / "other.jsonl", GOOD)).describe()
    assert other["sha256"] != described["sha256"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "list found; expected a JSON object"),
        ({"choices": ["a", "b"], "answer": "a"}, 'expected "prompt" or "question"'),
        (GOOD | {"prompt": 3}, '"prompt" must be a text'),
        (GOOD | {"prompt": " "}, '"prompt" must be a text that is not empty'),
        (GOOD | {"choices": ["blue"]}, '"choices" must be 2 or more different texts'),
        (GOOD | {"choices": ["blue", "blue"]}, '"choices" must be 2 or more'),
        (GOOD | {"choices": ["blue", " "]}, '"choices" must be 2 or more'),
        (GOOD | {"answer": "green"}, '"answer" must be one of the choices'),
        (GOOD | {"answer": 0}, '"answer" must be one of the choices, got 0'),
        (GOOD | {"prompt": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_a_bad_item_is_named(tmp_path, value, message):
    path = write(tmp_path / "own.jsonl", GOOD, value)
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 2: .*{message}"):
        load_items(path)


def test_files_without_items(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no items"):
        load_items(str(tmp_path / "empty.jsonl"))
    (tmp_path / "text.jsonl").write_text("The sky is blue.")
    with pytest.raises(ValueError, match=r"text\.jsonl, line 1: Expecting value"):
        load_items(str(tmp_path / "text.jsonl"))


def test_world():
    pytest.importorskip("countryinfo")
    found = load_items("world")
    assert len(found.items) >= 400 and found.chance == 0.25
    assert found.describe() == load_items("world").describe()
    assert found.packages.keys() == {"babel", "countryinfo", "periodictable"}
    known = {item.prompt: item.right for item in found.items}
    assert len(known) == len(found.items)  # nothing is asked twice
    assert known["The capital of France is"] == "Paris"
    assert known["Paris is the capital of"] == "France"
    assert known["The Netherlands is a country in"] == "Europe"
    assert known["The currency of Japan is the"] == "yen"
    assert known["The currency of Bulgaria is the"] == "lev"  # whatever came later
    assert known["The official language of Brazil is"] == "Portuguese"
    assert known["The chemical symbol of gold is"] == "Au"
    assert known["The atomic number of carbon is"] == "6"
    # The answer is in the question, or there are several.
    assert "The capital of Tunisia is" not in known
    assert "The capital of South Africa is" not in known
    assert "The official language of Belgium is" not in known
    for item in found.items:
        assert len(set(item.choices)) == 4
        assert item.right.lower() not in item.prompt.lower().split()
