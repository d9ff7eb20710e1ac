"""Records of every format, what is wrong with others, and where."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.llama.text.records import (
    ROLES,
    Message,
    Record,
    read_records,
)
from examples.llama.text.sources import parse_source
from tests.examples.llama.checkpoints.llama2c_files import refused

ALLOWED = (
    '; expected a JSON object with "question" and "answer", "instruction" and '
    '"output", "query" and "response", "prompt" and "answer", "messages", or "text"'
)
CHAT = [
    {"role": "system", "content": "be kind", "name": "x"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
]
FORMATS = [  # a record, and the texts of its user and its assistant
    ({"question": "q", "answer": "a"}, "q", "a"),
    ({"answer": "", "question": "", "id": 1}, "", ""),
    ({"instruction": "q", "output": "a"}, "q", "a"),
    ({"instruction": "q", "input": "", "output": "a", "text": "all"}, "q", "a"),
    ({"instruction": "q", "input": None, "output": "a"}, "q", "a"),
    ({"instruction": "q", "input": "i", "output": "a"}, "q\ni", "a"),
    (
        {"query": "q", "response": "a", "type": "GSM", "original_question": "o"},
        "q",
        "a",
    ),
    ({"prompt": "q", "answer": "a"}, "q", "a"),
    ({"question": "\u2028\n🙂", "answer": " a\r\n"}, "\u2028\n🙂", " a\r\n"),
]


def turn(question, answer):
    return Message("user", question), Message("assistant", answer)


def write(path, *values, ensure_ascii=True):
    lines = [json.dumps(value, ensure_ascii=ensure_ascii) for value in values]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_formats(tmp_path, ensure_ascii):
    values = [value for value, _, _ in FORMATS]
    path = tmp_path / "some.jsonl"
    write(
        path, *values, {"text": "plain"}, {"messages": CHAT}, ensure_ascii=ensure_ascii
    )
    records, bad = read_records(path)
    assert bad == []
    assert [r.source for r in records] == [f"{path}:{i}" for i in range(1, 12)]
    *pairs, plain, chat = [record.content for record in records]
    assert pairs == [turn(q, a) for _, q, a in FORMATS]
    assert plain == "plain"
    assert chat == (Message("system", "be kind"), *turn("hi", "hello"))


def test_lines(tmp_path):
    """Blank lines, a byte order mark, Windows' line breaks, and none at the end."""
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert read_records(str(path)) == (
        [Record("a", f"{path}:1"), Record("b", f"{path}:4")],
        [],
    )


@pytest.mark.parametrize("indent", [None, 2])
def test_json_list(tmp_path, indent):
    """As Alpaca and TRACE come."""
    values = [value for value, _, _ in FORMATS]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(values, indent=indent))
    records, _ = read_records(path)
    assert [record.content for record in records] == [turn(q, a) for _, q, a in FORMATS]
    assert records[2].source == f"{path}:3"
    write(path, *values)  # JSON lines by that name
    assert read_records(path).records == records
    write(path, [*values, {"text": 1}])
    with refused(f'{path}, record {len(values) + 1}: "text" is int{ALLOWED}'):
        read_records(path)
    assert len(read_records(path, skip_bad=True).records) == len(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "record 1: no record in the file"),
        (
            b'[{"text": "a"},\n{"text": "b"\n',
            "line 3: Expecting ',' delimiter at column 1",
        ),
        (b'[\n"\xff"]', "line 2: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "line 1: maximum recursion depth exceeded"),
    ],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_damaged_json_list(tmp_path, content, message, skip_bad):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with refused(f"{path}, {message}") as caught:
        read_records(path, skip_bad=skip_bad)
    assert "; expected " in str(caught.value)


GOOD = b'{"question": "a", "answer": "b"}\n'


def chat(*messages):
    return json.dumps({"messages": messages}).encode()


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (
            GOOD + b'{"question": "a"',
            2,
            "Expecting ',' delimiter at column 17; expected",
        ),
        (GOOD + b"\n\nnonsense\n", 4, "Expecting value at column 1; expected"),
        (b"[" * 100_000, 1, "recursion"),
        (b'{"a":' * 100_000, 1, "recursion"),
        (b'{"text": ' + b"1" * 5000 + b"}", 1, "integer string conversion"),
        (GOOD + b'["question", "answer"]', 2, "list found" + ALLOWED),
        (GOOD + b'"question"', 2, "str found" + ALLOWED),
        (b'{"question": "a"}', 1, '"answer" is missing' + ALLOWED),
        (b'{"prompt": "a", "completion": "b"}', 1, '"answer" is missing' + ALLOWED),
        (b'{"a": 1, "output": "b"}', 1, "fields ['a', 'output'] found" + ALLOWED),
        (b"{}", 1, "fields [] found" + ALLOWED),
        (b'{"\\ud83d": 1}', 1, "fields ['\\ud83d'] found" + ALLOWED),
        (b'{"question": 1, "answer": "b"}', 1, '"question" is int' + ALLOWED),
        (b'{"question": "a", "answer": null}', 1, '"answer" is NoneType' + ALLOWED),
        (b'{"question": "a", "answer": "\\ud83d"}', 1, "surrogates not allowed"),
        (GOOD + b'{"question": "\xff"', 2, "can't decode byte 0xff in position 14"),
        (
            b'{"instruction": "a", "input": ["b"], "output": "c"}',
            1,
            '"input" is list' + ALLOWED,
        ),
        (b'{"text": {"a": "b"}}', 1, '"text" is dict' + ALLOWED),
        (
            b'{"question": "a", "answer": "b", "answer": "c"}',
            1,
            '"answer" is there more than once' + ALLOWED,
        ),
        (
            GOOD + b'{"instruction": "a", "input": "", "input": "", "output": "c"}',
            2,
            '"input" is there more than once' + ALLOWED,
        ),
        (
            b'{"messages": [], "text": "a", "messages": []}',
            1,
            '"messages" is there more than once' + ALLOWED,
        ),
        (
            b'{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}',
            1,
            'message 1: "role" is there more than once' + ALLOWED,
        ),
        (b'{"messages": "a"}', 1, '"messages" is str' + ALLOWED),
        (chat(), 1, '"messages" has no turn of an assistant' + ALLOWED),
        (chat(*CHAT[:2]), 1, '"messages" has no turn of an assistant' + ALLOWED),
        (chat(*CHAT, "hello"), 1, "message 4 is str" + ALLOWED),
        (chat({"role": "user"}), 1, 'message 1: "content" is missing' + ALLOWED),
        (
            chat(*CHAT, {"role": "tool", "content": "x"}),
            1,
            "message 4: role is 'tool', not one of system, user, assistant" + ALLOWED,
        ),
        (chat({"role": ["user"], "content": "x"}), 1, 'message 1: "role" is list'),
        (
            chat({"role": "user", "content": [{"type": "text", "text": "x"}]}),
            1,
            'message 1: "content" is list' + ALLOWED,
        ),
    ],
)
def test_malformed_records(tmp_path, content, line, message):
    path = tmp_path / "some.jsonl"
    path.write_bytes(content)
    with refused(message) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert ALLOWED in str(caught.value)
    # The others are read, and that one is told of.
    path.write_bytes(content.rstrip(b"\n") + b"\n" + GOOD)
    records, bad = read_records(path, skip_bad=True)
    assert bad == [str(caught.value)]
    assert len(records) == 1 + content.startswith(GOOD)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_repeated_fields_that_are_not_read(tmp_path, suffix):
    good = '{"id": 1, "id": 2, "question": "a", "answer": "b", "x": {"c": 1, "c": 2}}'
    bad = '{"question": "a", "question": "b", "answer": "c"}'
    path = tmp_path / f"some.{suffix}"
    path.write_text(f"[{good}, {bad}]" if suffix == "json" else f"{good}\n{bad}\n")
    records, (reason,) = read_records(path, skip_bad=True)
    assert records == [Record(turn("a", "b"), f"{path}:1")]
    kind = "record" if suffix == "json" else "line"
    assert reason == f'{path}, {kind} 2: "question" is there more than once{ALLOWED}'


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_no_records(tmp_path, content):
    path = tmp_path / "some.jsonl"
    path.write_bytes(content)
    for skip_bad in (False, True):
        with refused(f"{path}, line 1: no record in the file{ALLOWED}"):
            read_records(path, skip_bad=skip_bad)


def test_only_bad_records(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": 1}\n2\n')
    with refused(f'{path}: all records are bad, 2. {path}, line 1: "text" is int'):
        read_records(path, skip_bad=True)


def test_absent(tmp_path):
    for name in ("absent.jsonl", "absent.json"):
        with pytest.raises(FileNotFoundError, match="absent"):
            read_records(tmp_path / name)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "text", "question"])
            | st.sampled_from(["answer", "instruction", "input", "output", "prompt"]),
            inner | st.sampled_from(ROLES),
            max_size=4,
        )
    ),
    max_leaves=12,
)
json_lines = st.lists(json_values.map(json.dumps), max_size=4).map("\n".join)


@settings(max_examples=400)
@given(
    content=st.binary(max_size=40) | json_lines.map(str.encode),
    suffix=st.sampled_from(["json", "jsonl"]),
    skip_bad=st.booleans(),
)
def test_any_file(tmp_path_factory, content, suffix, skip_bad):
    """Either records, whose texts are Unicode, or a ValueError that names the file."""
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(content)
    try:
        records, bad = read_records(path, skip_bad=skip_bad)
    except ValueError as error:
        assert str(path) in str(error)
        assert "expected" in str(error)
        str(error).encode()  # it can be printed
        return
    assert records and (skip_bad or not bad)
    for record in records:
        if isinstance(record.content, str):
            record.content.encode()
            continue
        assert "assistant" in [message.role for message in record.content]
        for message in record.content:
            assert message.role in ROLES
            message.content.encode()


def test_real_records(data_dir):
    records, bad = read_records(data_dir / "gsm8k_train.jsonl")
    assert (len(records), bad) == (7473, [])
    assert records[0].content[0].content.startswith("Natalia sold clips to 48 of")
    assert records[0].content[1].content.endswith("#### 72")
    records, bad = read_records(data_dir / "metamathqa_sample.jsonl")
    assert (len(records), bad) == (1024, [])
    assert {tuple(m.role for m in record.content) for record in records} == {
        ("user", "assistant")
    }
    assert all("answer is" in record.content[1].content for record in records)


def test_datasets_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "data"
    folder.mkdir()
    # A column that other rows have is null.
    values = [{"instruction": "q", "output": "a"}]
    values += [{"instruction": "q", "output": str(i), "input": "i"} for i in range(5)]
    write(folder / "train.jsonl", *values)
    write(folder / "test.jsonl", *values[:2], {"instruction": "q", "input": "i"})
    name = f"hf:{folder}"
    records, bad = read_records(name)
    assert bad == []
    assert records[0] == Record(turn("q", "a"), f"{name}:1")
    assert [r.content for r in records[1:]] == [turn("q\ni", str(i)) for i in range(5)]
    for split in ("train", "train[2:4]"):
        for config in ("", "default"):
            found = read_records(f"{name}:{config}:{split}").records
            chosen = slice(2, 4) if "[" in split else slice(None)
            assert [r.content for r in found] == [r.content for r in records[chosen]]
    with refused(f'{name}::test, record 3: "output" is NoneType{ALLOWED}'):
        read_records(f"{name}::test")
    assert len(read_records(f"{name}::test", skip_bad=True).records) == 2
    with refused(f'{name}::dev: Unknown split "dev".'):
        read_records(f"{name}::dev")
    with refused(f"{name}:other: BuilderConfig 'other' not found"):
        read_records(f"{name}:other")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_records(f"hf:{tmp_path}/absent")
    with refused("'hf:' names no data set; expected hf:NAME[:CONFIG][:SPLIT]"):
        read_records("hf:")


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("a.jsonl", "a.jsonl", 1),
        ("a.jsonl:0.25", "a.jsonl", 0.25),
        ("a.jsonl:1e3", "a.jsonl", 1000),
        ("dir/a:b.jsonl", "dir/a:b.jsonl", 1),
        (r"C:\data\a.jsonl", r"C:\data\a.jsonl", 1),
        (r"C:\data\a.jsonl:3", r"C:\data\a.jsonl", 3),
        ("hf:openai/gsm8k", "hf:openai/gsm8k", 1),
        ("hf:openai/gsm8k:main:train", "hf:openai/gsm8k:main:train", 1),
        ("hf:openai/gsm8k:main:train[:100]", "hf:openai/gsm8k:main:train[:100]", 1),
        ("hf:openai/gsm8k::train:.5", "hf:openai/gsm8k::train", 0.5),
        ("a:2:1", "a:2", 1),
        ("a:", "a:", 1),
    ],
)
def test_parse_source(text, name, weight):
    assert parse_source(text) == (name, weight)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e999", "-0.0"])
def test_parse_source_weights(weight):
    with refused(
        f"'a.jsonl:{weight}' has weight {weight}; expected one above 0, and finite"
    ):
        parse_source(f"a.jsonl:{weight}")


@pytest.mark.parametrize("text", ["", " ", ":2", " :1"])
def test_parse_source_names(text):
    with refused(f"{text!r} names no file; expected FILE or FILE:WEIGHT"):
        parse_source(text)
