"""Questions with one right answer among several, by which knowledge is measured."""

import hashlib
import json
from typing import Any, NamedTuple


class Item(NamedTuple):
    """A question with one right answer among several."""

    prompt: str  # what a choice continues, without the space between them
    choices: tuple[str, ...]
    answer: int  # the right one of the choices
    question: str = ""  # the same in words, where there are any
    relation: str = "all"  # its kind

    @property
    def right(self) -> str:
        return self.choices[self.answer]


class Items(NamedTuple):
    """A probe of what a model knows."""

    items: tuple[Item, ...]
    source: str  # "world" or a file's name
    packages: dict[str, str]  # versions of the packages that made them

    @property
    def chance(self) -> float:
        """The share of items that guessing gets right."""
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    def first(self, count: int | None) -> "Items":
        """The first so many items of each relation; all of them for None."""
        kept: list[Item] = []
        for item in self.items:
            before = sum(other.relation == item.relation for other in kept)
            if count is None or before < count:
                kept.append(item)
        return self._replace(items=tuple(kept))

    def with_question(self, count: int | None = None) -> "Items":
        """Those that have a question; at most so many of them, evenly from all."""
        kept = [item for item in self.items if item.question]
        if count is not None and count < len(kept):
            kept = [kept[i * len(kept) // count] for i in range(count)]
        return self._replace(items=tuple(kept))

    def describe(self) -> dict[str, Any]:
        """What numbers depend on, for files of results."""
        text = json.dumps(self.items, ensure_ascii=False)
        return {
            "source": self.source,
            "items": len(self.items),
            "chance": self.chance,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "packages": self.packages,
        }
