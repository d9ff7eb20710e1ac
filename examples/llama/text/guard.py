"""What makes a turn of a conversation, and how text of a message is kept from it.

Only a template makes turns. Text of a message stays text, whatever it reads like:

- What reads like a special token is parted by `APART`, and a tokenizer encodes what is
  on either side of it by itself. The text stays the same.
- What reads like a mark that a template writes as plain text, such as ``[/INST]`` of
  Llama 2 or ``<|assistant|>`` of the paper's format, has the same tokens as the mark.
  So the text itself changes: it gets a space, ``[/ INST]`` or ``<| assistant|>``.
"""

import bisect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from tokenizers import AddedToken, Tokenizer
from tokenizers.normalizers import Normalizer

from examples.llama.text.records import ROLES
from examples.llama.text.rendering import Chat

# Where text is parted. Unicode keeps these characters free for uses such as this one.
APART = "\ufdd0\ufdd1"
_PAPER_MARKS = tuple(f"<|{role}|>" for role in ROLES)

MADE = 16  # places of a message in which a normalizer may make names
_BRACKETED = re.compile(r"<\S+?>+|\[\S+?\]+|\{\S+?\}+")
_CONTROL = re.compile(r"<\|.+\|>|<｜.+｜>")
# They belong to answers, in which templates look for them, and begin no turn.
_THOUGHTS = ("<think>", "</think>")
_TRIALS = (
    ("system", "user", "assistant", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("user", "assistant"),
)
_CONTENTS = [f"Message {letter} of a trial." for letter in "ABCDE"]


class Guard:
    """Keeps text from being special tokens or marks; see this module.

    Calling it again on what it gave changes nothing.

    Args:
      tokens: What reads like one of these is parted.
      marks: What reads like one of these gets a space.
      normalizer: The tokenizer's. Text also reads like what it makes of the text.
    """

    def __init__(
        self,
        tokens: Collection[str],
        marks: Collection[str],
        normalizer: Normalizer | None,
    ):
        self._tokens = Finder(tokens, normalizer, lambda _: 1)
        self._marks = Finder(marks, normalizer, _inside)

    def __call__(self, text: str) -> str:
        """The text, in which only APART and spaces are new.

        Raises:
          ValueError: It reads like a token of one character, or like a mark even with
            the space.
        """
        while APART in text:  # which would hide what it parts
            text = text.replace(APART, "")
        before, text = text, self._marks.interrupt(text, " ")
        if text != before and (name := self._marks.find(text)) is not None:
            raise ValueError(
                f"a message has the text {name!r}, which makes a turn even with a "
                "space inside; expected other text"
            )
        return self._tokens.interrupt(text, APART)


class Finder:
    """Finds names in texts, also where a normalizer makes them.

    Args:
      names: What to find.
      normalizer: A tokenizer's, which changes or leaves out single characters.
      inside: Where in a name to interrupt it.
    """

    def __init__(
        self,
        names: Collection[str],
        normalizer: Normalizer | None,
        inside: Callable[[str], int],
    ):
        self._inside = inside
        # Characters that were met, and those of them that are risky.
        self._known: set[str] = set()
        self._risky: set[str] = set()
        self._normalize = normalizer.normalize_str if normalizer and names else None
        changed = {self._normalized(name) for name in names}
        self._pattern = _pattern({*names, *changed})
        self._changed_pattern = _pattern(changed)
        self._characters = set("".join(changed))

    def find(self, text: str) -> str | None:
        """What of the text reads like a name, if anything does."""
        if found := self._pattern.search(text):
            return found[0]
        return text[: self._end(text)][-20:] if self._reads(text) else None

    def interrupt(self, text: str, between: str) -> str:
        """The text with `between` inside of all that reads like a name.

        Raises:
          ValueError: That is one character, or a normalizer makes names in more than
            `MADE` places.
        """

        def interrupted(found: re.Match[str]) -> str:
            name, place = found[0], self._inside(found[0])
            if len(name) == 1:
                raise ValueError(
                    f"a message has the text {name!r}, which the tokenizer's template "
                    "makes a special token; expected other text, or template paper"
                )
            return name[:place] + between + name[place:]

        while self._pattern.search(text):  # again, as names may overlap
            text = self._pattern.sub(interrupted, text)
        return APART.join(self._part(part, between) for part in text.split(APART))

    def _part(self, text: str, between: str) -> str:
        """The same for the names that the normalizer makes of a part."""
        done = ""
        for _ in range(MADE):
            if not self._reads(text):
                return done + text
            end = self._end(text)
            done, text = done + text[: end - 1] + between, text[end - 1 :]
        raise ValueError(
            f"the tokenizer reads special tokens or turns in {MADE} places or more of "
            f"a message, as in {text[:20]!r}; expected other text"
        )

    def _end(self, text: str) -> int:
        """Where the first name ends that the normalizer makes."""
        ends = range(1, len(text))
        return 1 + bisect.bisect_left(ends, True, key=lambda n: self._reads(text[:n]))

    def _reads(self, text: str) -> bool:
        """Whether the normalizer makes a name of the text."""
        # Nearly all texts need not be normalized to know.
        if self._normalize is None:
            return False
        characters = set(text)
        new = characters - self._known
        self._known |= new
        self._risky.update(filter(self._is_risky, new))
        if self._risky.isdisjoint(characters):
            return False
        return self._changed_pattern.search(self._normalize(text)) is not None

    def _normalized(self, text: str) -> str:
        """What becomes of a text inside of another one."""
        if self._normalize is None:
            return text
        # Some put something in front of all texts, and some take spaces off their ends.
        start = self._normalize("x")
        return self._normalize(f"x{text}x").removeprefix(start).removesuffix("x")

    def _is_risky(self, character: str) -> bool:
        """Whether a character may be part of a name that a normalizer makes."""
        changed = self._normalized(character)
        return changed != character and (
            not changed or not self._characters.isdisjoint(changed)
        )


def scaffolds(
    render: Callable[[list[Chat]], list[list[str] | ValueError]],
) -> list[list[str]]:
    """What a chat template writes before, between and after messages, of trial ones.

    Args:
      render: Renders conversations by the template.

    Returns:
      For each conversation whose messages are all found, one text more than messages.
    """
    chats = []
    for roles in _TRIALS:
        pairs = zip(roles, _CONTENTS, strict=False)
        messages = [{"role": role, "content": content} for role, content in pairs]
        chats.append(Chat(messages, [(len(messages), False)]))
    found = []
    for chat, texts in zip(chats, render(chats), strict=True):
        if isinstance(texts, ValueError):
            continue
        own, (text,) = [], texts
        for message in chat.messages:
            before, content, text = text.partition(message["content"])
            own.append(before)
            if not content:
                break
        else:
            found.append([*own, text])
    return found


def make_special(backend: Tokenizer, texts: Sequence[Sequence[str]]) -> None:
    """Makes added tokens special that a template writes around messages.

    Some models' files do not mark those that begin a turn.

    Args:
      backend: Whose tokens it is, and what changes.
      texts: What `scaffolds` found.
    """
    written = "\n".join(text for own in texts for text in own)
    backend.add_special_tokens(
        [
            AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=True,
            )
            for token in backend.get_added_tokens_decoder().values()
            if not token.special
            and token.content in written
            and _BRACKETED.fullmatch(token.content)
            and token.content not in _THOUGHTS
        ]
    )


def _text_marks(texts: Sequence[Sequence[str]], tokens: Iterable[str]) -> set[str]:
    """The marks of turns that a template writes as plain text.

    They are what is in brackets, without spaces. Where nothing but other text parts two
    messages, as in "ASSISTANT:", it is all of that.

    Args:
      texts: What `scaffolds` found.
      tokens: The special tokens, which are no plain text.
    """
    marks: set[str] = set()
    pattern = _pattern(tokens)
    for own in texts:
        for i, text in enumerate(own):
            parts = pattern.split(text)
            bracketed = {x for part in parts for x in _BRACKETED.findall(part)}
            if not bracketed and len(parts) == 1 and 0 < i < len(own) - 1:
                bracketed = {text.strip()}
            marks |= bracketed
    return {
        mark
        for mark in marks
        if len(mark) > 1 and any(map(str.isalnum, mark)) and mark not in _THOUGHTS
    }


def make_guards(
    backend: Tokenizer, template: str | None, texts: Sequence[Sequence[str]]
) -> dict[tuple[str, bool], Guard]:
    """Guards by the template, "paper" or "tokenizer", and whether an assistant speaks.

    In what an assistant says, added tokens stay tokens that are not special. In the
    paper's format the tokenizer does not look for special tokens.

    Args:
      backend: The tokenizer.
      template: Its chat template.
      texts: What `scaffolds` found.
    """
    added, normalizer = backend.get_added_tokens_decoder(), backend.normalizer
    special = [token.content for token in added.values() if token.special]
    control, marks = _control_tokens(added, template), _text_marks(texts, special)
    return {
        ("paper", False): Guard(control, _PAPER_MARKS, normalizer),
        ("paper", True): Guard([], _PAPER_MARKS, normalizer),
        ("tokenizer", False): Guard([*special, *control], marks, normalizer),
        ("tokenizer", True): Guard(special, marks, normalizer),
    }


def _control_tokens(added: Mapping[int, AddedToken], template: str | None) -> list[str]:
    """Added tokens that are not special and yet no part of a text.

    These are names in brackets, if they are written ``<|...|>`` or the template has
    them. Others, such as runs of spaces and tags of HTML, are there for texts.
    """
    return [
        token.content
        for token in added.values()
        if not token.special
        and _BRACKETED.fullmatch(token.content)
        and (_CONTROL.fullmatch(token.content) or token.content in (template or ""))
    ]


def _inside(mark: str) -> int:
    """Where a mark gets its space: before its first letter, or else its last one."""
    first = next(i for i, character in enumerate(mark) if character.isalnum())
    return first or len(mark) - 1


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, set(names)), key=lambda x: (-len(x), x))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
