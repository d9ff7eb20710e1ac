"""Chat templates that loop or take memory end in an error, and others are untouched."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from examples.llama.text.rows import load_dataset
from examples.llama.text.tokenizer import load_tokenizer
from tests import processes
from tests.examples.llama.checkpoints.llama2c_files import refused
from tests.examples.llama.text.tokenizer_files import CHATML_TEMPLATE, write_llama3

CHAT = [{"role": "user", "content": "the answer?"}]
TIME = "it computes for more than 5 seconds, the most that is allowed"
MEMORY = "it takes more than 512 MiB of memory, the most that is allowed"
LOOPING = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
DOUBLING = (
    "{% set n = namespace(x='a') %}"
    "{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


def tokenizer_with(directory, template):
    write_llama3(directory, chat_template=template)
    return load_tokenizer(directory)


@pytest.mark.parametrize(
    "template",
    [
        LOOPING,
        "{{ (7 ** (10 ** 9)) is odd }}",  # within one operation
    ],
)
def test_a_template_that_loops(tmp_path, template):
    tokenizer = tokenizer_with(tmp_path, template)
    for _ in range(2):  # the second time it does not run
        with refused(TIME) as caught:
            tokenizer.apply_chat_template(CHAT)
        assert str(tmp_path / "tokenizer_config.json") in str(caught.value)


ALLOCATING = [
    DOUBLING,
    "{{ 'a' * 10 ** 12 }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ [0] * 10 ** 10 }}",
    "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('a' * 999) }}",
]


@pytest.mark.parametrize("template", ALLOCATING)
def test_a_template_that_allocates(tmp_path, template):
    tokenizer = tokenizer_with(tmp_path, template)
    with refused(MEMORY) as caught:
        tokenizer.apply_chat_template(CHAT)
    assert str(tmp_path / "tokenizer_config.json") in str(caught.value)
    other = tokenizer_with(tmp_path, CHATML_TEMPLATE)
    assert (
        other.apply_chat_template(CHAT) == "<|im_start|>user\nthe answer?<|im_end|>\n"
    )


MEASURE = """
import re, resource, sys
from pathlib import Path
from examples.llama.text.rendering import Chat, render
(found,) = render(sys.argv[1], [Chat([], [(0, False)])], {})
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
own = Path("/proc/self/status").read_text()  # the other one is of before exec, too
print(int(re.search(r"VmHWM:\\s+(\\d+)", own)[1]) >> 10)
print(found)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system sets no such limit")
@pytest.mark.parametrize("template", [DOUBLING, ALLOCATING[2]])
def test_the_memory_that_it_takes(template):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURE, template],
        cwd=processes.ROOT, capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    child, own, message = result.stdout.splitlines()
    assert int(child) <= 512 and int(own) < 100 and message == MEMORY


@pytest.mark.slow
def test_memory_that_is_only_looked_at(tmp_path, monkeypatch):
    """As on macOS, where the system sets no limit."""
    tokenizer = tokenizer_with(tmp_path, CHATML_TEMPLATE)
    # A new process is started after one that was ended.
    with refused("computes for"):
        tokenizer_with(tmp_path, LOOPING + "a").apply_chat_template(CHAT)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tokenizer.apply_chat_template(CHAT)
    growing = (
        "{% set n = namespace(x=[]) %}{% for i in range(9999) %}"
        "{% set n.x = [n.x, i ~ 'a' * 999999] %}{% endfor %}"
    )
    with refused(MEMORY):
        tokenizer_with(tmp_path, growing).apply_chat_template(CHAT)


def test_texts_that_are_too_long(tmp_path):
    long = "{{ 'a' * 40000000 }}"
    with refused("it writes more than 33,554,432 characters, the most that is allowed"):
        tokenizer_with(tmp_path, long).apply_chat_template(CHAT)
    # A message may be longer.
    tokenizer = tokenizer_with(tmp_path, "{{ messages[0].content }}")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a" * 40_000_000}]
    )
    assert len(text) == 40_000_000


@pytest.mark.slow
def test_a_record_on_which_a_template_loops(tmp_path):
    template = CHATML_TEMPLATE + (
        f"{{% if messages[0].content == 'loop' %}}{LOOPING}{{% endif %}}"
    )
    tokenizer = tokenizer_with(tmp_path, template)
    path = tmp_path / "some.jsonl"
    pairs = [{"question": x, "answer": "an"} for x in ("a", "b", "loop", "c")]
    path.write_text("\n".join(map(json.dumps, pairs)))
    dataset = load_dataset(path, tokenizer, 99, template="tokenizer", skip_bad=True)
    assert [dataset.records(row) for row in (0, 1)] == [[f"{path}:1"], [f"{path}:2"]]
    assert len(dataset) == 2  # the template is not started again
    assert [x.split(": the")[0] for x in dataset.outcome.bad.first] == [
        f"{path}:3",
        f"{path}:4",
    ]
    assert all(TIME in reason for reason in dataset.outcome.bad.first)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_something_else_ends(tmp_path):
    tokenizer = tokenizer_with(tmp_path, CHATML_TEMPLATE)
    text = tokenizer.apply_chat_template(CHAT)
    children = [
        int(pid)
        for file in Path("/proc/self/task").glob("*/children")
        for pid in file.read_text().split()
        if b"chat_template" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(children) == 1
    os.kill(children[0], signal.SIGKILL)
    assert tokenizer.apply_chat_template(CHAT) == text


def test_many_threads(tmp_path):
    tokenizer = tokenizer_with(tmp_path, "{{ messages[0].content }}")
    contents = [f"{i}" * i for i in range(200)]

    def run(content):
        return tokenizer.apply_chat_template([{"role": "user", "content": content}])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, contents)) == contents
