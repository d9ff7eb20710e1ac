"""Chat templates in Jinja, as `transformers` has them, and the process that fills them.

``python -m examples.llama.text.chat_template`` answers requests of
`examples.llama.text.rendering`, which says what is bounded.
"""

import contextlib
import datetime
import json
import signal
import struct
import sys
from typing import Any, BinaryIO

import jinja2
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5  # of computing that a rendering may take
MEMORY = 512 << 20  # bytes that the process may take
LARGEST = 1 << 25  # characters of a conversation's text
TOO_MUCH_MEMORY = f"it takes more than {MEMORY >> 20} MiB of memory"
LENGTH = struct.Struct("<Q")  # before each request and answer, in bytes

# What a template is told when it asks for the date, so that the same records give the
# same tokens on every day. Llama 3's own assume this one where there is no clock.
_TODAY = datetime.datetime(2024, 7, 26)


def compile_chat_template(template: str) -> jinja2.Template:
    """Compiles what a tokenizer's "chat_template" holds.

    Its globals are those of ``transformers``, but the date is always 26 July 2024.

    Jinja's sandbox keeps a template from Python's own attributes and from changing its
    arguments. It bounds neither time nor memory.

    Raises:
      jinja2.TemplateError: It is no template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda style: _TODAY.strftime(style),
        "dict": lambda *args, **entries: dict(*args, **entries),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class _Generation(ext.Extension):
    """``{% generation %}``, with which some templates mark answers, changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """As in transformers, without names that reach into Python."""

    def __init__(*args: Any, **attributes: Any) -> None:  # a template may set "self"
        self, *rest = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **attributes).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False} | options)


class _TooLong(Exception):
    """Texts have more than LARGEST characters, those of their messages apart."""


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are no more.

    A request is a JSON object with the "number" of a template, its text as "template"
    the first time, the "variables" of the template, and "chats". A chat has "messages"
    and "wanted": pairs of how many of the messages to render, and whether with a prompt
    for an answer. An answer has "texts", for each chat a list of them or the error of
    the template, or it has the "limit" that the template exceeds. A template that
    computes for too long ends the process.
    """
    templates: dict[int, str] = {}
    compiled: dict[int, jinja2.Template] = {}

    def texts(request: dict[str, Any], chat: dict[str, Any], room: int) -> list[str]:
        number, messages = request["number"], chat["messages"]
        if number not in compiled:
            compiled[number] = compile_chat_template(templates[number])
        found = []
        for count, prompt in chat["wanted"]:
            _limit_seconds(SECONDS)
            # Copies, as what a template is given could be of one rendering to another.
            given = [dict(message) for message in messages[:count]]
            found.append(
                compiled[number].render(
                    messages=given,
                    add_generation_prompt=prompt,
                    tools=None,
                    documents=None,
                    **request["variables"],
                )
            )
            if (room := room - len(found[-1])) < 0:
                raise _TooLong
        return found

    def all_texts(request: dict[str, Any]) -> dict[str, Any]:
        found: list[list[str] | str] = []
        room = LARGEST + request["characters"]
        try:
            for chat in request["chats"]:
                _limit_seconds(SECONDS)
                try:
                    found.append(texts(request, chat, room))
                    room -= sum(map(len, found[-1]))
                except (MemoryError, _TooLong):
                    raise
                except Exception as error:  # a template can raise anything
                    found.append(f"{type(error).__name__}: {str(error)[:1000]}")
        except MemoryError:
            return {"limit": TOO_MUCH_MEMORY}
        except _TooLong:
            return {"limit": f"it writes more than {LARGEST:,} characters"}
        return {"texts": found}

    while length := requests.read(LENGTH.size):
        request = json.loads(requests.read(*LENGTH.unpack(length)))
        if "template" in request:
            templates[request["number"]] = request["template"]
        answer = all_texts(request)
        _limit_seconds(0)
        data = json.dumps(answer).encode()
        answers.write(LENGTH.pack(len(data)) + data)
        answers.flush()


def _limit_seconds(seconds: float) -> None:
    """Ends the process after so many seconds of computing from now; 0 takes it back."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    import resource

    # macOS knows no such limit; `rendering` watches the process there.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    if sys.argv[1:] == ["--limit-memory"]:
        _limit_memory()
    serve(sys.stdin.buffer, sys.stdout.buffer)
