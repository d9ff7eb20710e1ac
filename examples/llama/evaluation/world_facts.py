"""Facts of the world as items: of countries, places in them, and chemical elements.

They are made from data of the packages countryinfo (MIT), Babel (BSD; CLDR's data is
under the Unicode licence) and periodictable (public domain), which come with the extra
"knowledge". The items depend on the packages' versions, and on nothing that is drawn.

A relation is here if a small model, SmolLM2-135M-Instruct, knows clearly more of it
than chance. It knows too little of elements by their symbols, and of words of other
languages.
"""

import hashlib
from collections.abc import Iterable, Iterator
from datetime import date
from importlib.metadata import version
from typing import Any, NamedTuple

import periodictable
from babel import Locale
from babel.core import get_global
from babel.numbers import get_currency_name, get_territory_currencies
from countryinfo import CountryInfo

from examples.llama.evaluation.items import Item

CHOICES = 4  # of each item
COUNTRIES = 130  # the most populous ones
# Several capitals, or one that is new or disputed; a name that has changed; or a place
# that not everybody counts among the countries.
LEFT_OUT = frozenset(
    (
        *("BI", "BJ", "BO", "CI", "HK", "IL", "KZ", "LK", "ME", "MK"),
        *("PR", "PS", "SZ", "TW", "TZ", "YE", "ZA"),
    )
)
TWO_CONTINENTS = frozenset(("AM", "AZ", "EG", "GE", "RU", "TR"))
DISPUTED = frozenset({"Simferopol"})
UNCHANGED = date(2015, 1, 1), date(2025, 1, 1)  # currencies between these dates
ELEMENTS = 94  # those that occur in nature
ARTICLE = frozenset(("Netherlands", "Philippines", "Republic", "United"))  # "the"
LEAK = 3  # letters in common from which on a question gives its answer away


class Country(NamedTuple):
    name: str
    capital: str
    continent: str | None  # None where there are two
    places: tuple[str, ...]  # that time zones are named after, most of them cities
    currency: str | None  # such as "yen"; None where there are several
    language: str | None  # the only official one


class Relation(NamedTuple):
    """A kind of item: how its facts read, and what else an answer could be."""

    name: str
    prompt: str
    question: str
    facts: list[tuple[str, str]]  # subjects and answers
    alike: bool = False  # whether wrong choices should begin as the right one does


def packages() -> dict[str, str]:
    """The versions that the items depend on."""
    names = ("babel", "countryinfo", "periodictable")
    return {name: version(name) for name in names}


def world_facts() -> Iterator[Item]:
    """Items of four choices each, in the order of the relations below."""
    for relation in (*_of_countries(), *_of_elements()):
        yield from _items(relation)


def _of_countries() -> Iterator[Relation]:
    countries = _countries()
    capitals = [(x.name, x.capital) for x in countries]
    yield Relation(
        "capital",
        "The capital of {} is",
        "What is the capital of {}?",
        capitals,
    )
    yield Relation(
        "country of a capital",
        "{} is the capital of",
        "Which country has the capital {}?",
        [(capital, name) for name, capital in capitals],
    )
    known = {x.capital for x in countries} | DISPUTED
    yield Relation(
        "country of a place",
        "{} is a place in",
        "In which country is {}?",
        [
            (place, x.name)
            for x in countries
            for place in x.places
            if place not in known
        ],
    )
    yield Relation(
        "continent",
        "{} is a country in",
        "On which continent is {}?",
        [(x.name, x.continent) for x in countries if x.continent],
    )
    yield Relation(
        "currency",
        "The currency of {} is the",
        "What is the currency of {}?",
        [(x.name, x.currency) for x in countries if x.currency],
    )
    yield Relation(
        "language",
        "The official language of {} is",
        "What is the official language of {}?",
        [(x.name, x.language) for x in countries if x.language],
    )


def _countries() -> list[Country]:
    """The most populous countries, but for those left out."""
    known = [x for x in CountryInfo.all().values() if x.get("ISO", {}).get("alpha2")]
    known.sort(key=lambda x: (-(x.get("population") or 0), x["name"]))
    codes = {}
    for info in known[:COUNTRIES]:
        code = info["ISO"]["alpha2"]
        if code not in LEFT_OUT and code in Locale("en").territories:
            codes[code] = info
    return [_country(code, info) for code, info in codes.items()]


def _country(code: str, info: Any) -> Country:
    continent = None if code in TWO_CONTINENTS else info["region"]
    if continent == "Americas":
        south = info.get("intermediateregion") == "South America"
        continent = "South America" if south else "North America"
    zones = (name.split("/") for name in info.get("timezoneNames", []))
    places = tuple(zone[1].replace("_", " ") for zone in zones if len(zone) == 2)
    currencies = set(get_territory_currencies(code, *UNCHANGED))
    spoken = get_global("territory_languages").get(code, {}).items()
    official = [
        language
        for language, facts in spoken
        if facts["official_status"] in ("official", "de_facto_official")
    ]
    currency = language = None
    if len(currencies) == 1:
        # Without the country's name, which comes before: "yen" of "Japanese Yen".
        currency = get_currency_name(currencies.pop(), locale="en").split()[-1].lower()
    if len(official) == 1:
        language = Locale("en").languages.get(official[0])
    name = info["name"]
    if ARTICLE.intersection(name.split()):
        name = f"the {name}"
    return Country(name, info["capital"], continent, places, currency, language)


def _of_elements() -> Iterator[Relation]:
    elements = [x for x in periodictable.elements if 0 < x.number <= ELEMENTS]
    yield Relation(
        "symbol of an element",
        "The chemical symbol of {} is",
        "",  # a letter or two are found in answers of any kind
        [(x.name, x.symbol) for x in elements],
        alike=True,
    )
    yield Relation(
        "atomic number",
        "The atomic number of {} is",
        "What is the atomic number of {}?",
        [(x.name, str(x.number)) for x in elements],
    )


def _items(relation: Relation) -> Iterator[Item]:
    """A relation's items, without those that give their answers away."""
    answers = [answer for _, answer in relation.facts]
    right: dict[str, set[str]] = {}
    for subject, answer in relation.facts:
        right.setdefault(subject, set()).add(answer)
    for subject, answer in relation.facts:
        if len(right[subject]) > 1 or _leaks(subject, answer):
            continue
        wrong = {
            (relation.alike and other[0] != answer[0], _draw(subject, other), other)
            for other in answers
            if other != answer
        }
        choices = sorted([answer, *(x for *_, x in sorted(wrong)[: CHOICES - 1])])
        yield Item(
            _sentence(relation.prompt.format(subject)),
            tuple(choices),
            choices.index(answer),
            relation.question.format(subject),
            relation.name,
        )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _leaks(subject: str, answer: str) -> bool:
    """Whether a word of one begins like a word of the other, as Tunis of Tunisia."""
    return bool(_beginnings(subject.split()) & _beginnings(answer.split()))


def _beginnings(words: Iterable[str]) -> set[str]:
    names = (word.lower() for word in words if word != "the")
    return {name[:LEAK] for name in names if len(name) >= LEAK}


def _draw(subject: str, choice: str) -> bytes:
    """What choices are sorted by, so that a new fact leaves most items as they are."""
    return hashlib.sha256(f"{subject}|{choice}".encode()).digest()
