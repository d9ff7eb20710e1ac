"""Word problems like those of GSM8K, made by a program: no download, no end.

Each takes two to four steps of arithmetic on whole numbers. The answer shows them, and
the result after ####, as in GSM8K.
"""

import operator
import random
from collections.abc import Callable
from typing import NamedTuple

OPERATIONS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,  # only of multiples
}
NAMES = (
    *("Maya", "Tom", "Lena", "Omar", "Ruth", "Diego", "Priya", "Sam", "Nora", "Ivan"),
    *("Chloe", "Kofi", "Hana", "Paul", "Zoe", "Ben", "Aisha", "Leo", "Mei", "Jack"),
)
THINGS = (
    *("apples", "pencils", "stickers", "marbles", "cookies", "postcards", "shells"),
    *("balloons", "muffins", "beads", "stamps", "buttons", "candles", "tickets"),
)


class Problem(NamedTuple):
    """A question, and the worked answer to it."""

    question: str
    answer: str


def word_problems(count: int, seed: int) -> list[Problem]:
    """Different problems, in equal parts of each kind.

    Args:
      count: How many.
      seed: Of the names and numbers. Other seeds give mostly other problems; for a
        held-out set, cut one list in two.
    """
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = KINDS[len(found) % len(KINDS)](rng)
        found.setdefault(problem.question, problem)
    return list(found.values())


class _Work:
    """The lines of an answer."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.result = 0

    def step(self, before: str, a: int, sign: str, b: int, after: str) -> int:
        """Adds a line around a calculation, and returns its result."""
        self.result = OPERATIONS[sign](a, b)
        self.lines.append(f"{before} {a} {sign} {b} = {self.result}{after}")
        return self.result

    def problem(self, question: str) -> Problem:
        return Problem(question, "\n".join([*self.lines, f"#### {self.result}"]))


def _shopping(rng: random.Random) -> Problem:
    name, (first, second) = rng.choice(NAMES), rng.sample(THINGS, 2)
    a, b, price, other = (rng.randint(2, 9) for _ in range(4))
    paid = a * price + b * other + rng.randint(1, 30)
    work = _Work()
    one = work.step(f"The {first} cost", a, "*", price, " dollars.")
    two = work.step(f"The {second} cost", b, "*", other, " dollars.")
    total = work.step("Together that is", one, "+", two, " dollars.")
    work.step(f"So {name} gets back", paid, "-", total, " dollars.")
    return work.problem(
        f"{name} buys {a} {first} for ${price} each and {b} {second} for ${other} "
        f"each, and pays with ${paid}. How many dollars does {name} get back?"
    )


def _two_months(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    half = rng.randint(6, 60)
    work = _Work()
    may = work.step(f"{name} sold", 2 * half, "/", 2, f" {things} in May.")
    work.step("In both months that is", 2 * half, "+", may, f" {things}.")
    return work.problem(
        f"{name} sold {2 * half} {things} in April and half as many in May. How many "
        f"{things} did {name} sell in April and May together?"
    )


def _journey(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    fast, slow = 5 * rng.randint(8, 14), 5 * rng.randint(2, 7)
    first, second = rng.randint(2, 6), rng.randint(2, 6)
    work = _Work()
    one = work.step("On the highway:", fast, "*", first, " miles.")
    two = work.step("On the country road:", slow, "*", second, " miles.")
    work.step("The whole way is", one, "+", two, " miles.")
    return work.problem(
        f"{name} drives on the highway at {fast} miles per hour for {first} hours, and "
        f"then on a country road at {slow} miles per hour for {second} hours. How many "
        "miles is that in total?"
    )


def _sharing(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    boxes, each, friends = rng.randint(3, 9), rng.randint(6, 20), rng.randint(2, 6)
    kept = boxes * each % friends + friends * rng.randint(1, 2)
    work = _Work()
    total = work.step(f"{name} has", boxes, "*", each, f" {things}.")
    rest = work.step("There are", total, "-", kept, f" {things} to share.")
    work.step("Each friend gets", rest, "/", friends, f" {things}.")
    return work.problem(
        f"{name} has {boxes} boxes with {each} {things} in each. {name} keeps {kept} "
        f"{things} and shares the others equally among {friends} friends. How many "
        f"{things} does each friend get?"
    )


def _wages(rng: random.Random) -> Problem:
    name, wage = rng.choice(NAMES), rng.randint(8, 25)
    hours, days = rng.randint(3, 8), rng.randint(2, 6)
    spent = rng.randint(10, wage * hours * days - 5)
    work = _Work()
    total = work.step(f"{name} works", hours, "*", days, " hours.")
    earned = work.step("For that the pay is", wage, "*", total, " dollars.")
    work.step("What is left is", earned, "-", spent, " dollars.")
    return work.problem(
        f"{name} earns ${wage} an hour and works {hours} hours a day for {days} days. "
        f"Then {name} spends ${spent}. How many dollars are left of what was earned?"
    )


def _ages(rng: random.Random) -> Problem:
    old, middle, young = rng.sample(NAMES, 3)
    age, times, older = rng.randint(4, 15), rng.randint(2, 3), rng.randint(2, 12)
    work = _Work()
    second = work.step(f"{middle} is", times, "*", age, " years old.")
    first = work.step(f"{old} is", second, "+", older, " years old.")
    pair = work.step(f"{young} and {middle} are", age, "+", second, " together.")
    work.step("All three are", pair, "+", first, " years old together.")
    return work.problem(
        f"{old} is {older} years older than {middle}, who is {times} times as old as "
        f"{young}. {young} is {age} years old. How old are all three together?"
    )


def _garden(rng: random.Random) -> Problem:
    name, rows, plants = rng.choice(NAMES), rng.randint(3, 12), rng.randint(4, 15)
    lost, fruits = rng.randint(2, rows * plants - 4), rng.randint(3, 9)
    work = _Work()
    total = work.step(f"{name} plants", rows, "*", plants, " tomato plants.")
    left = work.step("Of these", total, "-", lost, " survive the frost.")
    work.step("They bear", left, "*", fruits, " tomatoes.")
    return work.problem(
        f"{name} plants {rows} rows of {plants} tomato plants. Frost kills {lost} of "
        f"them, and each of the others bears {fruits} tomatoes. How many tomatoes are "
        "there?"
    )


def _reading(rng: random.Random) -> Problem:
    name, pages, days = rng.choice(NAMES), rng.randint(10, 40), rng.randint(3, 9)
    later, more = rng.randint(10, 40), rng.randint(2, 9)
    total = pages * days + later * more
    work = _Work()
    read = work.step(f"{name} first reads", pages, "*", days, " pages.")
    rest = work.step("There are", total, "-", read, " pages to go.")
    work.step("They take", rest, "/", later, " days.")
    return work.problem(
        f"{name} reads a book of {total} pages, {pages} pages a day for the first "
        f"{days} days and {later} pages a day after that. How many more days does "
        f"{name} need to finish the book?"
    )


def _recipe(rng: random.Random) -> Problem:
    name, cups, people = rng.choice(NAMES), rng.randint(2, 6), rng.randint(2, 6)
    times, there = rng.randint(2, 6), rng.randint(1, 3)
    work = _Work()
    times = work.step("The recipe is made", people * times, "/", people, " times.")
    needed = work.step("That takes", cups, "*", times, " cups of flour.")
    work.step(f"{name} must buy", needed, "-", there, " cups.")
    return work.problem(
        f"A recipe for {people} people takes {cups} cups of flour. {name} cooks it for "
        f"{people * times} people and has {there} cups. How many cups of flour must "
        f"{name} buy?"
    )


def _fence(rng: random.Random) -> Problem:
    name, width = rng.choice(NAMES), rng.randint(4, 30)
    longer, price = rng.randint(2, 20), rng.randint(2, 12)
    work = _Work()
    length = work.step("The length is", width, "+", longer, " feet.")
    half = work.step("Length and width are", length, "+", width, " feet together.")
    around = work.step("The fence is", 2, "*", half, " feet long.")
    work.step("It costs", around, "*", price, " dollars.")
    return work.problem(
        f"{name} puts a fence around a garden that is {width} feet wide and {longer} "
        f"feet longer than wide. A foot of fence costs ${price}. How many dollars does "
        "the fence cost?"
    )


def _discount(rng: random.Random) -> Problem:
    name, price = rng.choice(NAMES), 20 * rng.randint(1, 12)
    percent, count = rng.choice((5, 10, 20, 25, 50)), rng.randint(2, 6)
    work = _Work()
    cents = work.step("The discount is", price, "*", percent, " cents.")
    less = work.step("In dollars that is", cents, "/", 100, ".")
    reduced = work.step("A chair then costs", price, "-", less, " dollars.")
    work.step(f"{name} pays", reduced, "*", count, " dollars.")
    return work.problem(
        f"A chair costs ${price}. In the sale it is {percent}% cheaper, and {name} "
        f"buys {count} chairs. How many dollars does {name} pay?"
    )


def _school(rng: random.Random) -> Problem:
    part, teachers = rng.randint(2, 6), rng.randint(2, 9)
    children = part * rng.randint(8, 60)
    work = _Work()
    away = work.step("On the trip are", children, "/", part, " children.")
    here = work.step("At school there are", children, "-", away, " children.")
    work.step("With the teachers that is", here, "+", teachers, " people.")
    return work.problem(
        f"A school has {children} children. One in {part} of them is on a trip. The "
        f"others are at school with {teachers} teachers. How many people are at school?"
    )


KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    *(_shopping, _two_months, _journey, _sharing, _wages, _ages),
    *(_garden, _reading, _recipe, _fence, _discount, _school),
)
