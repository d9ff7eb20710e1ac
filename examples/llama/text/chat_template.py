"""Chat templates in Jinja, as `transformers` has them, in Jinja's sandbox."""

import datetime
import json
from collections.abc import Sized
from typing import Any

import jinja2
from jinja2 import ext, nodes
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

# What a template is told when it asks for the date, so that the same records give the
# same tokens on every day. Llama 3's own assume this one where there is no clock.
_TODAY = datetime.datetime(2024, 7, 26)


def compile_chat_template(template: str) -> jinja2.Template:
    """Compiles what a tokenizer's "chat_template" holds.

    Its globals are those of ``transformers``, but the date is always 26 July 2024.

    Raises:
      jinja2.TemplateError: It is no template.
    """
    environment = _Sandbox(
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


class _Sandbox(ImmutableSandboxedEnvironment):
    """Its products and powers are limited as its ranges are: they could fill memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        a, b = (len(x) if isinstance(x, Sized) else abs(x) for x in (left, right))
        # In floats a power overflows, where integers would not.
        size = a * b if operator == "*" else float(a) ** float(b)
        if size > MAX_RANGE:
            raise jinja2.exceptions.SecurityError(
                f"{operator} gives more than {MAX_RANGE}, the most that is allowed"
            )
        return super().call_binop(context, operator, left, right)


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
