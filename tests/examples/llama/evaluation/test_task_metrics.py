"""Scores of answers, by hand and by the numbers that others publish."""

import pytest

from examples.llama.evaluation.task_metrics import METRICS, sari_of


def score(name, answers, expected, questions=None):
    return METRICS[name](answers, expected, questions or [""] * len(answers))


def test_exact_match():
    assert score("exact_match", [" a\n", "b", "c", "A"], ["a", "b ", "d", "a"]) == 50


def test_first_letter():
    answers = ["B: because", " A", "", "b"]
    assert score("first_letter", answers, ["B", "C", "", "B"]) == 25


def test_rouge_l():
    """The longest common subsequence has 2 words, of 2 and of 4."""
    found = score("rouge_l", ["the cat", ""], ["the black cat sat", "x"])
    assert found == pytest.approx(100 * (2 * 1 * 0.5 / 1.5) / 2)


def test_edit_similarity():
    """One deletion in 3 + 4 characters; nothing in common; the same."""
    found = score("edit_similarity", ["abc", "xy", "z"], ["abcd", "ab", " z "])
    assert found == pytest.approx(100 * (6 / 7 + 0 + 1) / 3)


def test_sari_as_published():
    """The example in the documentation of Hugging Face's evaluate."""
    found = sari_of(
        "About 95 you now get in.",
        [
            "About 95 species are currently known.",
            "About 95 species are now accepted.",
            "95 species are now accepted.",
        ],
        "About 95 species are currently accepted.",
    )
    assert found == pytest.approx(0.26953601953601954, rel=1e-9)


def test_sari_of_the_expected_text():
    same = "He is a good man."
    assert score("sari", [same], [same], ["He was an excellent man."]) == 100
    assert score("sari", ["A b c d e"], [same], ["A b c d e"]) < 50
