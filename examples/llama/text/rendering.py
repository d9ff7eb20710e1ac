"""Chat templates rendered within bounds, in a process of their own.

A chat template is a program that comes with a model's files, and it may loop or take
memory without end. What holds:

- Templates run in one child process, which is started at the first rendering and used
  for all. A signal of the system ends it when one rendering has computed for 5 seconds,
  in whatever code that is. This process ends it when a request, of up to 64
  conversations, takes 60 seconds.
- On Linux the system gives the child no more than 512 MiB of addresses. Elsewhere, as
  on macOS, this process looks every 20 ms how much memory the child has and ends it
  above 512 MiB; what it takes between two looks is not bounded. A text of more than 32
  million characters, its messages apart, is refused as well.
- A template that exceeded a limit is not started again while this process runs. Of many
  conversations in a request, each is then tried alone, up to the one that exceeds it.

The child is no jail: it has the rights of the user, and only Jinja's sandbox keeps a
template from files and the network. Windows is not supported.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.llama.text.chat_template import LENGTH, MEMORY, SECONDS, TOO_MUCH_MEMORY

PATIENCE = 60  # seconds until an answer, however busy the machine is
_AT_ONCE = 64  # conversations in a request
_LOOK = 20  # milliseconds between two looks at the child's memory


class TooMuch(Exception):
    """What a template takes more of than it may."""


class Ended(TooMuch):
    """Something else ended the process, which may be no fault of the template."""


class _Child:
    """The process, and the templates that it has."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "examples.llama.text.chat_template"]
        if sys.platform != "darwin":
            command.append("--limit-memory")
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            bufsize=0,
            start_new_session=True,  # so that Ctrl-C is this process's alone
        )
        assert self._process.stdin and self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._ready = select.poll()
        self._ready.register(self._answers, select.POLLIN)
        self._numbers: dict[str, int] = {}
        self.owner = os.getpid()

    def ask(self, template: str, request: dict[str, Any]) -> dict[str, Any]:
        """What `chat_template.serve` answers; TooMuch where it cannot."""
        number = self._numbers.get(template)
        if number is None:
            number = self._numbers[template] = len(self._numbers)
            request = request | {"template": template}
        data = json.dumps(request | {"number": number}).encode()
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(BrokenPipeError):  # reading finds out why
            view = memoryview(LENGTH.pack(len(data)) + data)
            while view:
                view = view[self._requests.write(view) :]
        (length,) = LENGTH.unpack(self._read(LENGTH.size, deadline))
        answer: dict[str, Any] = json.loads(self._read(length, deadline))
        if "limit" in answer:
            raise TooMuch(answer["limit"])
        return answer

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            if self._ready.poll(_LOOK):
                part = os.read(self._answers.fileno(), min(count - len(data), 1 << 20))
                if not part:
                    raise self._end()
                data += part
            elif _memory(self._process.pid) > MEMORY:
                raise TooMuch(TOO_MUCH_MEMORY)
            elif time.monotonic() > deadline:
                raise TooMuch(f"it gives no text within {PATIENCE} seconds")
        return bytes(data)

    def _end(self) -> TooMuch:
        """Why the process ended."""
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return TooMuch(f"it computes for more than {SECONDS} seconds")
        return Ended(f"it ends the process that renders it, with exit code {code}")

    def close(self) -> None:
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()
        else:  # a copy in a process that forked
            self._process.returncode = 0
        self._requests.close()
        self._answers.close()


_lock = threading.Lock()
_child: _Child | None = None
_refused: dict[str, str] = {}  # templates that exceeded a limit, and which


class Chat(NamedTuple):
    """A conversation to render."""

    messages: Sequence[Mapping[str, Any]]
    # For each text, the number of messages that it covers, and whether it ends with the
    # prompt for an answer.
    wanted: Sequence[tuple[int, bool]]


def render(
    template: str, chats: Sequence[Chat], variables: Mapping[str, Any]
) -> list[list[str] | ValueError]:
    """The texts that a chat template makes of conversations.

    Args:
      template: In Jinja, see `chat_template.compile_chat_template`.
      chats: The conversations. Many at once take less time.
      variables: Other values for the template.

    Returns:
      The texts of each conversation, or why there are none: the template is invalid,
      refuses the messages, or exceeds a limit of this module.

    Raises:
      OSError: The process cannot be started.
    """
    found = []
    for first in range(0, len(chats), _AT_ONCE):
        with _lock:
            found += _render(template, chats[first : first + _AT_ONCE], variables)
    return found


def _render(
    template: str,
    chats: Sequence[Chat],
    variables: Mapping[str, Any],
    *,
    again: bool = True,
) -> list[list[str] | ValueError]:
    global _child
    if template in _refused:
        return [ValueError(_refused[template]) for _ in chats]
    if _child is not None and _child.owner != os.getpid():
        _close()
    if _child is None:
        _child = _Child()
    request = {
        "chats": [{"messages": chat.messages, "wanted": chat.wanted} for chat in chats],
        "characters": sum(
            len(str(value)) * len(chat.wanted)
            for chat in chats
            for message in chat.messages
            for value in message.values()
        ),
        "variables": variables,
    }
    try:
        answer = _child.ask(template, request)
    except BaseException as error:
        _close()  # it may be in the middle of an answer
        if not isinstance(error, TooMuch):
            raise
        if isinstance(error, Ended) and again:
            return _render(template, chats, variables, again=False)
        if len(chats) > 1:  # which one is it?
            return [_render(template, [chat], variables)[0] for chat in chats]
        allowed = "" if isinstance(error, Ended) else ", the most that is allowed"
        _refused[template] = f"{error}{allowed}"
        return [ValueError(_refused[template])]
    return [
        ValueError(found) if isinstance(found, str) else found
        for found in answer["texts"]
    ]


def _memory(pid: int) -> int:
    """The bytes of memory that a process has now; 0 where that is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        if (statm := Path(f"/proc/{pid}/statm")).exists():
            return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        command = ["ps", "-o", "rss=", "-p", str(pid)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return int(found.stdout) << 10
    return 0


@atexit.register
def _close() -> None:
    global _child
    if _child is not None:
        _child.close()
        _child = None
