"""Tokens, masks and rows against the texts that they come from."""

import json
import random
import re

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from examples.llama.text.dataset import FIELDS, Noted, Outcome
from examples.llama.text.rows import load_dataset, load_text
from examples.llama.text.tokenizer import Tokenizer
from tests.examples.llama.checkpoints.llama2c_files import refused
from tests.examples.llama.text.tokenizer_files import (
    CHATML_TEMPLATE,
)


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write_pairs(path, *pairs):
    return write_lines(path, *({"question": q, "answer": a} for q, a in pairs))


def segments(dataset):
    """The tokens and the mask of each record by its name, all else checked."""
    found = {}
    rows = dataset.take()
    assert len(dataset) == len(rows["tokens"])
    for row in range(len(dataset)):
        tokens, mask, ids, positions = (rows[x][row] for x in FIELDS)
        names = dataset.records(row)
        used = np.flatnonzero(ids)
        assert used.tolist() == list(range(len(used)))  # padding is at the end
        assert set(ids[used]) == set(range(1, len(names) + 1))
        assert (np.diff(ids[used]) >= 0).all()
        assert not mask[len(used) :].any() and not positions[len(used) :].any()
        for i, name in enumerate(names, start=1):
            inside = ids == i
            assert positions[inside].tolist() == list(range(inside.sum()))
            assert not mask[inside][0]
            assert name not in found
            found[name] = tokens[inside].tolist(), mask[inside].tolist()
    return found


def check_types(dataset, length):
    assert dataset.length == length
    for name, array in dataset.take().items():
        assert array.dtype == (bool if name == "loss_mask" else np.int32)
        assert array.shape == (len(dataset), length)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
awkward = st.sampled_from(
    ["", " ", "\n", "</s>", "<s>", "\nan", ".\n", "🙂", " 4", "an"]
)


@settings(max_examples=100)
@given(question=texts | awkward, answer=(texts | awkward).filter(str.strip))
def test_format(tokenizer, llama2, llama3, tmp_path_factory, question, answer):
    path = tmp_path_factory.getbasetemp() / "format.jsonl"
    write_pairs(path, (question, answer))
    prompt = f"<|user|>\n{question}\n<|assistant|>\n"
    for tk in (tokenizer, llama2, llama3):
        dataset = load_dataset(path, tk, 256)
        check_types(dataset, 256)
        assert dataset.outcome[:2] == (0, 0) and not dataset.outcome.bad.number
        [(name, (ids, mask))] = segments(dataset).items()
        assert name == f"{path}:1"
        assert (dataset.take()["tokens"][0][len(ids) :] == tk.pad_id).all()
        counted = np.flatnonzero(mask).tolist()
        first, last = counted[0], counted[-1]
        assert counted == list(range(first, last + 1))  # an answer is in one piece
        end = tk.eos_ids[0]
        assert ids[0] == tk.bos_id and ids[last] == end and ids.count(end) == 1
        # As generate.py has it, of which the model is to continue.
        assert ids[1:first] == tk.encode(prompt)
        assert tk.decode(ids[1:last]) == prompt + answer
        assert tk.decode(ids) == f"{prompt}{answer}\n"


def test_conversation_by_hand(tokenizer, tmp_path):
    messages = [
        {"role": "system", "content": "an"},
        {"role": "user", "content": "us"},
        {"role": "assistant", "content": " 4"},
        {"role": "user", "content": "4"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "t"},
    ]
    path = write_lines(tmp_path / "chat.jsonl", {"messages": messages})
    [(ids, mask)] = segments(load_dataset(path, tokenizer, 100)).values()
    pieces = [tokenizer.backend.id_to_token(i) for i in ids]
    marked = [
        f"[{x}]" if counted else x for x, counted in zip(pieces, mask, strict=True)
    ]
    text = "".join(marked)
    text = re.sub("<0x(..)>", lambda byte: chr(int(byte[1], 16)), text)
    assert text == (
        "<s> <|system|>\nan\n<|user|>\nus\n<|assistant|>\n[ ][4][</s>]\n"
        "<|user|>\n4\n<|assistant|>\n</s>\n<|user|>\nt\n"
    )


@pytest.mark.parametrize("template", ["paper", "tokenizer"])
def test_empty_answers(llama3, tmp_path, template):
    """Nothing is learned of them, and they end no run, not even without skip_bad."""
    talk = ["an", "answer", "an", " \n", "an", "other"]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(talk)
    ]
    lines = [
        {"question": "an", "answer": ""},
        {"messages": messages},
        {"question": "", "answer": "an"},
        {"text": " "},
    ]
    path = write_lines(tmp_path / "some.jsonl", *lines)
    dataset = load_dataset(path, llama3, 99, template=template)
    empty = Noted(3, (f"{path}:1", f"{path}:2", f"{path}:4"))
    assert dataset.outcome == Outcome(dropped=2, empty=empty)
    found = segments(dataset)
    assert list(found) == [f"{path}:2", f"{path}:3"]
    (ids, mask), _ = found.values()
    assert llama3.decode(np.array(ids)[mask].tolist()) == "answerother"
    assert np.count_nonzero(np.diff(mask)) == 4 - mask[-1]  # two stretches
    write_lines(path, *lines[::3])
    with refused(
        f"{path}: none of 2 records has a token to learn within max_length 99; 2 have "
        f"an empty answer, the first {path}:1"
    ):
        load_dataset(path, llama3, 99, template=template)


def test_plain_text_by_hand(tokenizer, llama3, tmp_path):
    path = write_lines(tmp_path / "plain.jsonl", {"text": "an </s>"}, {"text": ""})
    for tk in (tokenizer, llama3):
        for template in ("paper", "tokenizer"):
            dataset = load_dataset(path, tk, 30, template=template)
            [first] = segments(dataset).values()
            ids = [tk.bos_id, *tk.encode("an </s>"), tk.eos_ids[0]]
            assert first == (ids, [False] + [True] * (len(ids) - 1))
            empty = Noted(1, (f"{path}:2",))
            assert (dataset.outcome.dropped, dataset.outcome.empty) == (1, empty)
    without = Tokenizer(llama3.backend, None, llama3.eos_ids, llama3.pad_id)
    dataset = load_dataset(path, without, 30)
    [(ids, mask)] = segments(dataset).values()
    assert ids == [*llama3.encode("an </s>"), llama3.eos_ids[0]]
    assert mask == [False] + [True] * (len(ids) - 1)
    assert dataset.outcome.dropped == 1


def test_tokenizers_template_by_hand(llama2, llama3, tmp_path):
    messages = [
        {"role": "user", "content": "an other "},
        {"role": "assistant", "content": "the\nanswer"},
        {"role": "user", "content": "24"},
        {"role": "assistant", "content": "72."},
    ]
    path = write_lines(tmp_path / "chat.jsonl", {"messages": messages})
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    texts = [head.format(x["role"], x["content"].strip()) for x in messages]
    expected = llama3.encode_chat("<|begin_of_text|>" + "".join(texts)).ids
    [(ids, mask)] = segments(
        load_dataset(path, llama3, 99, template="tokenizer")
    ).values()
    assert ids == expected
    counted = np.array(ids)[mask].tolist()
    assert counted == llama3.encode_chat("the\nanswer<|eot_id|>72.<|eot_id|>").ids
    # As Llama 2's tokenizers: a space before what follows a special token.
    whole = "<s>[INST] an other [/INST] the\nanswer </s><s>[INST] 24 [/INST] 72. </s>"
    [(ids, mask)] = segments(
        load_dataset(path, llama2, 99, template="tokenizer")
    ).values()
    assert ids == llama2.encode_chat(whole).ids
    parts = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)[1::2]
    assert [llama2.decode(part) for part in parts] == ["the\nanswer ", "72. "]
    assert [part[-1] for part in parts] == [2, 2]


def with_template(tokenizer, template, **changes):
    fields = {"bos_id": tokenizer.bos_id, "eos_ids": tokenizer.eos_ids} | changes
    return Tokenizer(tokenizer.backend, pad_id=0, chat_template=template, **fields)


def test_text_behind_the_end_token_does_not_count(llama3, tmp_path):
    path = write_pairs(tmp_path / "some.jsonl", ("an", "the"))
    # <|im_end|> is known from the template.
    tk = with_template(llama3, CHATML_TEMPLATE)
    [(ids, mask)] = segments(load_dataset(path, tk, 99, template="tokenizer")).values()
    assert ids[-1] not in tk.eos_ids and not mask[-1]
    assert np.array(ids)[mask].tolist() == tk.encode_chat("the<|im_end|>").ids
    # Where a template has no such token, all that comes behind the prompt counts.
    tk = with_template(llama3, CHATML_TEMPLATE.replace("<|im_end|>", "."))
    assert tk.eos_ids == llama3.eos_ids
    [(ids, mask)] = segments(load_dataset(path, tk, 99, template="tokenizer")).values()
    assert np.array(ids)[mask].tolist() == tk.encode("the.\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template"),
        ("{{ raise_exception('no ' + messages[0].role) }}", "TemplateError: no user"),
        (
            "{{ messages | length }}",
            "the chat template has other text for messages 1 to 2 alone than within "
            "the conversation, so that the answers cannot be told; expected a template "
            "that only adds text, or template paper",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}!",
            "messages 1 to 2 alone",
        ),
        ("{% if add_generation_prompt %}x{% endif %}", "messages 1 to 2 alone than"),
        (
            "{% if not add_generation_prompt %}{% for m in messages %}{{ m.content }}"
            "{% endfor %}{% endif %}",
            "messages 1 to 4 alone than",
        ),
    ],
)
def test_templates_that_do_not_fit(llama3, tmp_path, template, message):
    chat = [{"role": r, "content": r} for r in ("user", "assistant") * 2]
    path = write_lines(tmp_path / "some.jsonl", {"text": "an"}, {"messages": chat})
    tk = with_template(llama3, template)
    with refused(message) as caught:
        load_dataset(path, tk, 99, template="tokenizer")
    assert str(caught.value).startswith(f"{path}:2: ")
    dataset = load_dataset(path, tk, 99, template="tokenizer", skip_bad=True)
    assert list(segments(dataset)) == [f"{path}:1"]
    assert dataset.outcome.bad == (1, (str(caught.value),))


def test_special_tokens_in_the_text_of_a_template(llama3, tmp_path):
    pairs = [("a", "b"), ("<|eot_id|>a", "an <|begin_of_text|> and <|eot_id|>")]
    path = write_pairs(tmp_path / "some.jsonl", *pairs)
    dataset = load_dataset(path, llama3, 99, template="tokenizer")
    plain, found = segments(dataset).values()
    special = set(llama3.encode_chat(llama3.apply_chat_template([])).ids)
    special |= {*llama3.eos_ids, llama3.bos_id}
    kept = [[i for i in ids if i in special] for ids, _ in (plain, found)]
    assert kept[0] == kept[1]
    assert llama3.decode(found[0]) == (
        f"user\n\n{pairs[1][0]}assistant\n\n{pairs[1][1]}"
    )
    counted = np.array(found[0])[found[1]].tolist()
    assert counted[-1] == llama3.backend.token_to_id("<|eot_id|>")
    assert llama3.decode(counted) == pairs[1][1]


def test_a_special_token_of_one_character(llama3, tmp_path):
    path = write_pairs(tmp_path / "some.jsonl", ("5 §", "a"), ("5", "a"))
    backend = Backend.from_str(llama3.backend.to_str())
    backend.add_special_tokens(["§"])
    tk = Tokenizer(backend, None, llama3.eos_ids, 0, CHATML_TEMPLATE)
    with refused(
        f"{path}:1: a message has the text '§', which the tokenizer's template makes a "
        "special token; expected other text, or template paper"
    ):
        load_dataset(path, tk, 99, template="tokenizer")
    dataset = load_dataset(path, tk, 99, template="tokenizer", skip_bad=True)
    assert (len(dataset), dataset.outcome.bad.number) == (1, 1)
    assert len(load_dataset(path, tk, 99)) == 2


def test_bad_records(tokenizer, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "an"}\n{"text": 1}\n3\n{"query": "a", "response": "b"}\n')
    with refused(f'{path}, line 2: "text" is int; expected a JSON object with'):
        load_dataset(path, tokenizer, 30)
    dataset = load_dataset(path, tokenizer, 30, skip_bad=True)
    assert list(segments(dataset)) == [f"{path}:1", f"{path}:4"]
    assert [x.split(";")[0] for x in dataset.outcome.bad.first] == [
        f'{path}, line 2: "text" is int',
        f"{path}, line 3: int found",
    ]
    write_pairs(path, ("a", "a"), ("b", "b"))
    with refused(f"{path}: all records are bad, 2. {path}:1: the tokenizer has no ch"):
        load_dataset(path, tokenizer, 30, template="tokenizer", skip_bad=True)


@pytest.mark.parametrize("pack", [False, True])
def test_truncation(tokenizer, tmp_path, pack):
    pairs = [("us", "an"), ("", "4" * 9), ("an answer", "a")]
    path = write_pairs(tmp_path / "some.jsonl", *pairs)
    whole = segments(load_dataset(path, tokenizer, 100, pack=pack))
    firsts = [mask.index(True) for _, mask in whole.values()]
    longest = max(len(ids) for ids, _ in whole.values())
    assert len(set(firsts)) == 3
    for length in range(min(firsts) + 1, longest + 2):
        cut = load_dataset(path, tokenizer, length, pack=pack)
        kept = [name for name, (_, mask) in whole.items() if any(mask[:length])]
        assert segments(cut) == {
            name: (whole[name][0][:length], whole[name][1][:length]) for name in kept
        }
        check_types(cut, length)
        assert cut.outcome.dropped == 3 - len(kept)
        assert cut.outcome.truncated == sum(
            len(whole[name][0]) > length for name in kept
        )
    with refused(
        f"{path}: none of 3 records has a token to learn within max_length "
        f"{min(firsts)}"
    ):
        load_dataset(path, tokenizer, min(firsts), pack=pack)


def test_packing_loses_nothing(tokenizer, tmp_path):
    draw = random.Random(0)
    lengths = [1 + draw.randrange(130) ** 2 // 130 for _ in range(700)]
    pairs = [("an" * draw.randrange(9), "4" * length) for length in lengths]
    path = write_pairs(tmp_path / "some.jsonl", *pairs)
    single = load_dataset(path, tokenizer, 128)
    assert single.outcome.truncated and len(single) == 700
    packed = load_dataset(path, tokenizer, 128, pack=True)
    check_types(packed, 128)
    assert segments(packed) == segments(single)  # every record once
    assert packed.outcome == single.outcome
    assert (
        packed.take()["tokens"][packed.take()["segment_ids"] == 0] == tokenizer.pad_id
    ).all()
    assert len(packed) < 500
    used = np.mean(packed.take()["segment_ids"] > 0)
    assert used > 0.9 > 0.7 > np.mean(single.take()["segment_ids"] > 0)
    firsts = [int(packed.records(row)[0].split(":")[-1]) for row in range(len(packed))]
    assert firsts == sorted(firsts)
    again = load_dataset(path, tokenizer, 128, pack=True)
    chex.assert_trees_all_equal(again.take(), packed.take())


def as_before(tokenizer, question, answer):
    """A record's tokens with the text encoded in one piece, and the mask."""
    prompt = f"<|user|>\n{question}\n<|assistant|>\n"
    (encoding,) = tokenizer.encode_batch([f"{prompt}{answer}\n"])
    begin = encoding.char_to_token(len(prompt))
    end = encoding.char_to_token(len(prompt) + len(answer))
    ids = [1, *encoding.ids[:end], 2, *encoding.ids[end:]]
    return ids, [begin < i < end + 2 for i in range(len(ids))]


def test_real_records(data_dir, stories_tokenizer):
    path = data_dir / "gsm8k_test.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    whole = load_dataset(path, stories_tokenizer, 1200)
    assert (len(whole), whole.outcome) == (1319, Outcome())
    assert list(segments(whole).values()) == [
        as_before(stories_tokenizer, line["question"], line["answer"]) for line in lines
    ]
    packed = load_dataset(path, stories_tokenizer, 1200, pack=True)
    assert segments(packed) == segments(whole)
    assert np.mean(packed.take()["segment_ids"] > 0) > 0.9
    cut = load_dataset(path, stories_tokenizer, 256)
    assert len(cut) + cut.outcome.dropped == 1319 and cut.outcome.dropped
    kept = whole.take()["loss_mask"][:, :256].any(axis=1)
    first = {name: array[kept, :256] for name, array in whole.take().items()}
    chex.assert_trees_all_equal(cut.take(), first)


def test_real_chats(data_dir, stories_tokenizer):
    path = data_dir / "metamathqa_sample.jsonl"
    found = segments(load_dataset(path, stories_tokenizer, 4096)).values()
    lines = path.read_text().splitlines()
    for (ids, mask), line in zip(found, lines, strict=True):
        user, assistant = (x["content"] for x in json.loads(line)["messages"])
        assert (ids, mask) == as_before(stories_tokenizer, user, assistant)


def test_text(tokenizer, llama3, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("an answer.\r\n\n<s>🙂 4</s>\nan\n".encode())
    text = path.read_bytes().decode()
    without = Tokenizer(tokenizer.backend, None, (2,), 0)
    for tk in (tokenizer, llama3, without):
        ids = tk.encode(text)
        start = [] if tk.bos_id is None else [tk.bos_id]
        for length in (2, 7, len(ids) + 1, len(ids) + 9):
            dataset = load_text(path, tk, length)
            check_types(dataset, length)
            assert dataset.outcome[:2] == (0, 0) and not dataset.outcome.bad.number
            width = length - len(start)
            windows = [ids[i : i + width] for i in range(0, len(ids), width)]
            rows = dataset.take()
            tokens, used = rows["tokens"], rows["segment_ids"] == 1
            assert [
                row[use].tolist() for row, use in zip(tokens, used, strict=True)
            ] == [start + window for window in windows]
            assert (tokens[~used] == tk.pad_id).all()
            np.testing.assert_array_equal(rows["loss_mask"][:, 1:], used[:, 1:])
            assert not rows["loss_mask"][:, 0].any()
            np.testing.assert_array_equal(
                rows["positions"], np.where(used, np.arange(length)[None], 0)
            )


def test_lines_of_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{'an' * (i % 5)}\n" for i in range(40)))
    dataset = load_text(path, tokenizer, 4)
    before = ""
    for row in range(len(dataset)):
        line = before.count("\n") + 1
        assert dataset.records(row) == [f"{path}:{line}"]
        before = tokenizer.decode(
            dataset.take()["tokens"][: row + 1][dataset.take()["loss_mask"][: row + 1]]
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: no text in the file; expected UTF-8 text"),
        (b" \n\n", "line 1: no text in the file; expected UTF-8 text"),
        (b"some\ntext \xe9", "line 2: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_malformed_text(tokenizer, tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with refused(f"{path}, {message}"):
        load_text(path, tokenizer, 8)


def test_bad_arguments(tokenizer, tmp_path):
    path = write_pairs(tmp_path / "some.jsonl", ("an answer", "4"))
    for load in (load_dataset, load_text):
        with refused("max_length must be 2 or above, got 1"):
            load(path, tokenizer, 1)
        with pytest.raises(FileNotFoundError, match="absent"):
            load(tmp_path / "absent", tokenizer, 8)
    with refused("template must be paper or tokenizer, got 'chatml'"):
        load_dataset(path, tokenizer, 8, template="chatml")
