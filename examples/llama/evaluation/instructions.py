"""Whether a model still follows instructions: requests that a program can check.

As in IFEval (https://arxiv.org/abs/2311.07911), each request asks for a form that can
be verified. They are simple, so that small models obey some of them. The table was
written before any model was asked, and has all of them: choosing those that a model
obeys would make any other model look worse. An answer counts only if the model ends it.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from examples.llama.evaluation.answers import Answer, ask
from examples.llama.evaluation.knowledge import interval
from examples.llama.model.llama import Llama
from examples.llama.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 96  # of an answer
LINE_OF_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
END_OF_SENTENCE = re.compile(r"[.!?]+(?=\s|$)")


class Check(NamedTuple):
    """A request, and what obeys it."""

    kind: str  # of KINDS
    request: str
    value: Any = None  # what the kind's function needs to know

    def obeyed(self, answer: Answer) -> bool:
        return answer.ended and KINDS[self.kind](answer.text.strip(), self.value)


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'’-]+", text.lower())


def _has_key(text: str, key: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and key in value


# Whether an answer, without spaces around it, is of the form asked for.
KINDS: dict[str, Callable[[str, Any], bool]] = {
    "answers and stops": lambda text, _: bool(_words(text)),
    "one word": lambda text, _: len(_words(text)) == 1,
    "yes or no": lambda text, _: text.lower().rstrip(".!") in ("yes", "no"),
    "number": lambda text, _: re.fullmatch(r"\d[\d,]*(\.\d+)?\.?", text) is not None,
    "upper case": lambda text, _: text.isupper(),
    "lower case": lambda text, _: text.islower(),
    "in quotes": lambda text, _: re.fullmatch(r'(?s)["“].+["”]', text) is not None,
    "list": lambda text, count: len(LINE_OF_LIST.findall(text)) == count,
    "JSON": _has_key,
    "end": lambda text, phrase: text.rstrip('"”').endswith(phrase),
    "beginning": lambda text, phrase: text.lstrip('"“').startswith(phrase),
    "given word": lambda text, word: word in _words(text),
    "most words": lambda text, count: 0 < len(_words(text)) <= count,
    "sentences": lambda text, count: len(END_OF_SENTENCE.findall(text)) == count,
    "repetition": lambda text, given: _words(text) == _words(given),
    "left out": lambda text, letters: bool(text) and not set(letters) & set(text),
}
CHECKS = (
    Check("answers and stops", "Hello, who are you?"),
    Check("answers and stops", "Thank you for your help. Goodbye!"),
    Check("answers and stops", "What is the capital of Italy?"),
    Check("answers and stops", "What colour is grass?"),
    Check("one word", "Answer with one word only: what colour is the sky by day?"),
    Check("one word", "Name an animal that can fly. Answer with a single word."),
    Check("one word", "What is the opposite of hot? Reply with exactly one word."),
    Check("yes or no", "Is the sun a star? Answer only yes or no."),
    Check("yes or no", "Do fish live in water? Reply with just yes or no."),
    Check("yes or no", "Is a cat a plant? Answer only yes or no."),
    Check("number", "How many days are in a week? Answer with a number only."),
    Check("number", "What is 2 + 3? Reply with just the number."),
    Check("number", "How many legs does a spider have? Answer only with digits."),
    Check("upper case", "Say hello in all capital letters."),
    Check("upper case", "Name a fruit. Write your whole answer in capital letters."),
    Check("upper case", "Write one short sentence about dogs in ALL CAPS."),
    Check("lower case", "Write a short sentence about cats without capital letters."),
    Check("lower case", "Name a colour. Write your answer in lower case letters."),
    Check("lower case", "Describe rain in one sentence, all in lower case letters."),
    Check("in quotes", "Name a book. Put your whole answer in double quotes."),
    Check("in quotes", "Write a greeting. Wrap your entire answer in double quotes."),
    Check("list", "List three fruits, each on a new line that begins with a dash.", 3),
    Check("list", "Give me a numbered list of three countries in Europe.", 3),
    Check("list", "List exactly five colours as bullet points.", 5),
    Check("list", "Write a numbered list of four animals and nothing else.", 4),
    Check(
        "JSON", 'Write JSON with the key "capital": the capital of Spain.', "capital"
    ),
    Check("JSON", 'Write a JSON object with the key "name", value "Anna".', "name"),
    Check("JSON", 'Reply only with JSON: under the key "age", the number 7.', "age"),
    Check("end", 'Write a sentence about the sea. End with "The end."', "The end."),
    Check("end", 'Say what a tree is. Finish with "Any questions?"', "Any questions?"),
    Check("beginning", 'Tell me about the moon. Begin with "The moon".', "The moon"),
    Check("beginning", 'Say why sleep is good. Start with the word "Sleep".', "Sleep"),
    Check("beginning", 'Give me a tip for learning. Start with "My tip".', "My tip"),
    Check("given word", 'Write a sentence with the word "yellow".', "yellow"),
    Check("given word", 'Write a short sentence with the word "river".', "river"),
    Check("given word", 'Describe winter briefly. Use the word "snow".', "snow"),
    Check("most words", "What is water? Answer in at most ten words.", 10),
    Check("most words", "Describe the sun in no more than fifteen words.", 15),
    Check("most words", "Say what a car is in fewer than twelve words.", 11),
    Check("sentences", "Describe a horse in exactly one sentence.", 1),
    Check("sentences", "Tell me about bread in exactly two sentences.", 2),
    Check("sentences", "Write exactly three short sentences about school.", 3),
    Check(
        "repetition", "Repeat this: The cat sat on the mat.", "The cat sat on the mat"
    ),
    Check("repetition", "Repeat what I say and nothing else: Good day", "Good day"),
    Check("repetition", "Copy this word: banana", "banana"),
    Check("left out", "Describe summer in one sentence without a comma.", ","),
    Check("left out", "Name three vegetables without using any commas.", ","),
    Check("left out", "Write a short sentence without an exclamation mark.", "!"),
)


def obeyed(
    model: Llama, tokenizer: Tokenizer, *, progress: str = ""
) -> tuple[np.ndarray, list[str]]:
    """Which of CHECKS the model's likeliest answers obey, bool [checks], and those.

    Raises:
      ValueError: The tokenizer has no chat template, or there are several processes.
    """
    check_instructed(tokenizer)
    requests = [check.request for check in CHECKS]
    answers = ask(
        model, tokenizer, requests, max_new_tokens=MAX_NEW_TOKENS, progress=progress
    )
    found = [
        check.obeyed(answer) for check, answer in zip(CHECKS, answers, strict=True)
    ]
    return np.array(found), [answer.text for answer in answers]


def check_instructed(tokenizer: Tokenizer) -> None:
    """Raises ValueError where nothing can be asked in chat form."""
    if tokenizer.chat_template is None:
        raise ValueError("instructions need a tokenizer with a chat template")
    if jax.process_count() > 1:
        raise ValueError("instructions need one process")


def summary(found: np.ndarray) -> dict[str, Any]:
    """The share "obeyed", its 95% "interval" (Wilson's), and the shares by "kinds"."""
    kinds = {}
    for kind in dict.fromkeys(check.kind for check in CHECKS):
        of = np.array([check.kind == kind for check in CHECKS])
        kinds[kind] = {"checks": int(of.sum()), "obeyed": float(found[of].mean())}
    return {
        "obeyed": float(found.mean()),
        "interval": interval(found),
        "kinds": kinds,
    }
