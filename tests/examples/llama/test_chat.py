"""Asking a model: one that learned a few conversations, and one that never stops."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.evaluation.answers import answer, complete, write
from examples.llama.evaluation.conversation import Conversation
from examples.llama.generate import main
from examples.llama.text.records import Message, Record
from examples.llama.text.templates import prompts
from examples.llama.text.tokenizer import load_tokenizer, save_tokenizer
from examples.llama.training.loop import train
from tests import processes
from tests.examples.llama.runs import CONFIG, ROOT, config_of, random_model
from tests.examples.llama.text.tokenizer_files import CHATML_TEMPLATE, write_llama3

NAMES = {"Ann": "hello é 🙂🙃", "Bob": "oh no\nBob <|im_end|>!"}


# The second answer depends on the first message.
TALKS = [
    [
        {"role": "user", "content": f"I am {name}"},
        {"role": "assistant", "content": greeting},
        {"role": "user", "content": "who am I?"},
        {"role": "assistant", "content": f"{name}, of course"},
    ]
    for name, greeting in NAMES.items()
]
COMMAND = [sys.executable, "-W", "error", "-m", "examples.llama.generate"]


def model_of(**changes):
    """A model of random weights for the tokenizer of `start`."""
    config = dataclasses.replace(CONFIG, vocab_size=416, **changes)
    return random_model(config, np.random.default_rng(0))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model of random weights and a tokenizer with a ChatML template."""
    root = tmp_path_factory.mktemp("start")
    model = model_of(hidden_size=32, num_hidden_layers=2, max_position_embeddings=96)
    save_hugging_face(model, root)
    write_llama3(root, chat_template=CHATML_TEMPLATE)
    (root / "generation_config.json").unlink()
    return root


@pytest.fixture(scope="module")
def run(start, tmp_path_factory):
    """What the trainer makes of it with the conversations."""
    root = tmp_path_factory.mktemp("learned")
    data = root / "talks.jsonl"
    data.write_text("\n".join(json.dumps({"messages": talk}) for talk in TALKS))
    config = config_of(
        {"model": start, "data": (str(data),)},
        root / "run",
        template="tokenizer",
        method="adamw",
        steps=70,
        batch_size=2,
        max_length=80,
        samples=2,
        reference=False,
        eval_every=1000,
    )
    train(config)
    return root / "run"


@pytest.fixture(scope="module")
def learned(run):
    return load_model(run / "model"), load_tokenizer(run / "model")


@pytest.fixture(scope="module")
def endless(start, tmp_path_factory):
    """A directory with a model that reads 64 tokens and writes no end token."""
    directory = tmp_path_factory.mktemp("endless")
    save_hugging_face(model_of(), directory)
    save_tokenizer(load_tokenizer(start), directory)
    return directory


@pytest.fixture(scope="module")
def repeating(start, tmp_path_factory):
    """A directory with a model that says its prompt's last token, a long time."""
    directory = tmp_path_factory.mktemp("repeating")
    model = model_of(max_position_embeddings=20_000)
    for layer in model.layers:
        for products in (layer.self_attn.o_proj, layer.mlp.down_proj):
            products.kernel[...] = jnp.zeros_like(products.kernel[...])
    save_hugging_face(model, directory)
    save_tokenizer(load_tokenizer(start), directory)
    return directory


def asked(capsys, *options, stdin=None, monkeypatch=None):
    """What the command prints."""
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    main(list(map(str, options)))
    out, err = capsys.readouterr()
    return out, err


def test_one_question(run, capsys):
    for talk in TALKS:
        question, expected = talk[0]["content"], talk[1]["content"]
        out = asked(capsys, "--model", run / "model", "--chat", question)
        assert out == (f"{expected}\n", "")


def test_conversation_through_a_pipe(run):
    """Answers depend on what was said before; nothing is read behind a blank line."""
    turns = [message["content"] for message in TALKS[0]]
    result = subprocess.run(
        [*COMMAND, "--model", str(run / "model"), "--chat", "-"],
        input=f"{turns[0]}\n{turns[2]}\n\n{turns[0]}\n",
        cwd=ROOT, env=processes.environment() | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True, encoding="utf-8", timeout=300, check=True,
    )  # fmt: skip
    assert result.stdout == f"{turns[1]}\n{turns[3]}\n"
    assert result.stderr == ""


def test_end_tokens(start, run, learned):
    """One that the template alone names is learned, obeyed, and saved for others."""
    model, tokenizer = learned
    names = [tokenizer.backend.id_to_token(i) for i in tokenizer.eos_ids]
    assert names == ["<|end_of_text|>", "<|im_end|>"]
    saved = json.loads((run / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == list(tokenizer.eos_ids)
    # One more: the answer ends before it.
    (comma,) = tokenizer.encode(",")
    other = dataclasses.replace(tokenizer, eos_ids=(*tokenizer.eos_ids, comma))
    conversation = Conversation(model, other)
    for question, expected in (("I am Bob", NAMES["Bob"]), ("who am I?", "Bob")):
        assert "".join(conversation.ask(question)) == expected


def test_all_ways_to_ask(start, run, learned):
    """In parts, many at a time, and in the trainer's samples."""
    records = [Record(tuple(Message(**x) for x in talk), "here:1") for talk in TALKS]
    options = {"template": "tokenizer", "max_length": 80, "max_new_tokens": 16}
    texts = [talk[3]["content"] for talk in TALKS]
    assert answer(*learned, records, **options) == texts

    first = [Record(record.content[:1], "here:1") for record in records]
    questions = prompts(first, learned[1], "tokenizer")
    found = complete(*learned, questions, max_new_tokens=16)
    for whole, question in zip(found, questions, strict=True):
        parts = list(write(*learned, question, max_new_tokens=16))
        assert "".join(parts) == whole.text and len(parts) > 1 and all(parts)
        assert not any("\ufffd" in part for part in parts)

    # Of the model that the trainer began with.
    samples = json.loads((run / "samples.json").read_text())
    room = 96 - max(map(len, questions))
    model, tokenizer = load_model(start), load_tokenizer(start)
    found = complete(model, tokenizer, questions, max_new_tokens=room)
    assert {sample["answer"] for sample in samples} == {x.text for x in found}


def test_the_oldest_messages_are_dropped(endless, capsys, monkeypatch):
    model, tokenizer = load_model(endless), load_tokenizer(endless)
    conversation = Conversation(model, tokenizer, system="x", max_new_tokens=8)
    for turn in range(4):
        answer = "".join(conversation.ask(f"m{turn}"))
        kept = [*conversation.messages]
        assert kept[-2:] == [Message("user", f"m{turn}"), Message("assistant", answer)]
        assert len(kept) + conversation.dropped == 2 * turn + 2
        # As many as fit beside the answer, and the system message.
        system = Message("system", "x")
        longer = Record((system, *kept[:-1]), "here")
        (prompt,) = prompts([longer], tokenizer, "tokenizer")
        assert len(prompt) + 8 <= 64
        (expected,) = complete(model, tokenizer, [prompt], max_new_tokens=8)
        assert answer == expected.text
    assert conversation.dropped >= 2
    out, err = asked(
        capsys, "--model", endless, "--chat=-", "--max-new-tokens=8", "--system=x",
        stdin="m0\nm1\nm2\nm3\n", monkeypatch=monkeypatch,
    )  # fmt: skip
    assert out.endswith(answer + "\n")
    assert err.splitlines()[-1] == (
        "generate: the conversation is too long for the model; its first "
        f"{conversation.dropped} messages are left out from here on"
    )


def test_an_answer_ends_with_the_context(endless):
    model, tokenizer = load_model(endless), load_tokenizer(endless)
    conversation = Conversation(model, tokenizer, max_new_tokens=10_000)
    text = "".join(conversation.ask("a"))
    (prompt,) = prompts([Record((Message("user", "a"),), "a")], tokenizer, "tokenizer")
    room = 64 - len(prompt)
    (whole,) = complete(model, tokenizer, [prompt], max_new_tokens=room)
    assert whole.text == text


def test_an_answer_that_the_caller_ends(endless):
    conversation = Conversation(load_model(endless), load_tokenizer(endless))
    parts = conversation.ask("a")
    first = next(parts)
    parts.close()
    assert conversation.messages == [Message("user", "a"), Message("assistant", first)]


def test_draws(endless):
    model, tokenizer = load_model(endless), load_tokenizer(endless)
    found = []
    for seed in (1, 1, 2):
        options = {"max_new_tokens": 8, "temperature": 1.0, "seed": seed}
        conversation = Conversation(model, tokenizer, **options)
        found.append(["".join(conversation.ask("a")) for _ in range(2)])
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


def test_the_format_of_the_trainer(endless, capsys):
    """Needs no template of the tokenizer."""
    options = ["--model", endless, "--max-new-tokens", "8"]
    prompt = "<|user|>\nthe\n<|assistant|>\n"
    continued, _ = asked(capsys, *options, "--prompt", prompt)
    assert continued.startswith(prompt)
    out, _ = asked(capsys, *options, "--chat", "the", "--template", "paper")
    assert out == continued.removeprefix(prompt)
    # A message makes no turn.
    prompt = "<|user|>\nthe\n<| assistant|>\nan\n<|assistant|>\n"
    continued, _ = asked(capsys, *options, "--prompt", prompt)
    message = "the\n<|assistant|>\nan"
    out, _ = asked(capsys, *options, "--chat", message, "--template", "paper")
    assert out == continued.removeprefix(prompt)


REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}"
REFUSES_SYSTEM += "{% endif %}"


@pytest.mark.parametrize(
    ("options", "template", "message"),
    [
        (["--chat=a"], None, "conversation: the tokenizer has no chat template; expec"),
        (["--chat=-"], None, "conversation: the tokenizer has no chat template; expec"),
        (["--chat=a", "--system=b"], REFUSES_SYSTEM, "the chat template fails: Templ"),
        (["--chat=a"], "{% if %}", "the chat template fails: TemplateSyntaxError"),
        (["--chat=" + 99 * "ab"], CHATML_TEMPLATE, "leaves no room for an answer; the"),
        (["--system=b"], CHATML_TEMPLATE, "system needs --chat"),
        (["--chat=a", "--prompt=b"], CHATML_TEMPLATE, "prompt and chat exclude each"),
        (["--chat=a\udcff"], CHATML_TEMPLATE, "chat: 'utf-8' codec can't encode"),
        (["--chat=a", "--system=\udcff"], CHATML_TEMPLATE, "system: 'utf-8' codec"),
        (["--chat=a", "--max-new-tokens=0"], CHATML_TEMPLATE, "must be 1 or above"),
        (["--chat=a", "--temperature=-1"], CHATML_TEMPLATE, "temperature must be 0 or"),
    ],
)  # fmt: skip
def test_errors(endless, tmp_path, options, template, message, capsys, monkeypatch):
    for file in endless.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((endless / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").unlink()
    config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as caught:
        asked(
            capsys, "--model", tmp_path, *options, stdin="a\n", monkeypatch=monkeypatch
        )
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("generate: ") and message in err and err.count("\n") == 1


def test_on_a_terminal(repeating):
    """Ctrl-C ends a long answer, not the conversation."""
    pty = pytest.importorskip("pty", exc_type=ImportError)
    ours, theirs = pty.openpty()
    options = ["--model", str(repeating), "--max-new-tokens", "19000"]
    process = subprocess.Popen(
        [*COMMAND, *options, "--chat", "-"], cwd=ROOT, close_fds=True,
        stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, start_new_session=True,
        env=processes.environment() | {"TERM": "dumb", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def read_until(pattern):
        nonlocal seen
        while not re.search(pattern, seen, re.DOTALL):
            seen += os.read(ours, 4096)
        found, seen = seen, b""
        return found

    try:
        for message in (b"the", b"an"):
            read_until(rb"> $")
            os.write(ours, message + b"\n")
            read_until(rb"\n.{20,}")  # the echo, and some of the answer
            process.send_signal(signal.SIGINT)
        read_until(rb"> $")
        os.write(ours, b"\n")
        with contextlib.suppress(OSError):  # of a terminal whose other end is closed
            while os.read(ours, 4096):
                pass
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(ours)
    assert (process.returncode, err) == (0, b"")


def test_a_signal_ends_answers_that_go_elsewhere(repeating):
    options = ["--model", str(repeating), "--max-new-tokens", "19000"]
    process = subprocess.Popen(
        [*COMMAND, *options, "--chat", "the"], cwd=ROOT, env=processes.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, b"generate: stopped\n")
