"""Word problems that a program makes."""

import re

import pytest

from examples.word_problems import KINDS, word_problems

PROBLEMS = word_problems(2000, seed=0)


def test_as_many_as_asked_for_and_no_two_alike():
    assert len(PROBLEMS) == len({problem.question for problem in PROBLEMS}) == 2000
    assert word_problems(10, seed=0) == PROBLEMS[:10]
    assert word_problems(10, seed=1) != PROBLEMS[:10]


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_the_answer_is_right(kind):
    """Every sum is right and uses numbers known by then; the last one is the result."""
    for question, answer in PROBLEMS[kind :: len(KINDS)]:
        *lines, last = answer.split("\n")
        known = {*map(int, re.findall(r"\d+", question)), 2, 100}
        for line in lines:
            ((a, sign, b, result),) = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", line)
            a, b, result = int(a), int(b), int(result)
            assert {a, b} <= known
            right = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert right == result > 0
            known.add(result)
        assert last == f"#### {result}" and len(lines) >= 2
