"""Tokens, masks, rows and batches against the texts that they come from."""

import json
import random
import re
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from examples.llama.text.rows import (
    Dataset,
    load_dataset,
    load_text,
    ordered_batches,
    records_of,
    training_batches,
)
from examples.llama.text.tokenizer import Tokenizer, load_tokenizer
from tests.examples.llama.checkpoints.llama2c_files import (
    BASE,
    refused,
    write_tokenizer,
)
from tests.examples.llama.text.tokenizer_files import (
    CHATML_TEMPLATE,
)

PIECES = [*" <|>aensrtu4", "s>", "an", " a", " an", "ans", "us", "er", "\n\n", "\n"]
FIELDS = ("tokens", "loss_mask", "segment_ids", "positions")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.bin"
    return load_tokenizer(write_tokenizer(path, ["<unk>", *BASE, *PIECES]))


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write_pairs(path, *pairs):
    return write_lines(path, *({"question": q, "answer": a} for q, a in pairs))


def segments(dataset):
    """The tokens and the mask of each record by its name, all else checked."""
    found = {}
    assert len(dataset) == len(dataset.tokens)
    for row in range(len(dataset)):
        tokens, mask, ids, positions = (getattr(dataset, x)[row] for x in FIELDS)
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
    for name in FIELDS:
        array = getattr(dataset, name)
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
        assert (dataset.truncated, dataset.dropped, dataset.bad) == (0, 0, ())
        [(name, (ids, mask))] = segments(dataset).items()
        assert name == f"{path}:1"
        assert (dataset.tokens[0][len(ids) :] == tk.pad_id).all()
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
    assert dataset.empty == (f"{path}:1", f"{path}:2", f"{path}:4")
    assert (dataset.dropped, dataset.bad) == (2, ())
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
            assert (dataset.dropped, dataset.empty) == (1, (f"{path}:2",))
    without = Tokenizer(llama3.backend, None, llama3.eos_ids, llama3.pad_id)
    dataset = load_dataset(path, without, 30)
    [(ids, mask)] = segments(dataset).values()
    assert ids == [*llama3.encode("an </s>"), llama3.eos_ids[0]]
    assert mask == [False] + [True] * (len(ids) - 1)
    assert dataset.dropped == 1


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
    assert dataset.bad == (str(caught.value),)


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
    assert (len(dataset), len(dataset.bad)) == (1, 1)
    assert len(load_dataset(path, tk, 99)) == 2


def test_bad_records(tokenizer, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "an"}\n{"text": 1}\n3\n{"query": "a", "response": "b"}\n')
    with refused(f'{path}, line 2: "text" is int; expected a JSON object with'):
        load_dataset(path, tokenizer, 30)
    dataset = load_dataset(path, tokenizer, 30, skip_bad=True)
    assert list(segments(dataset)) == [f"{path}:1", f"{path}:4"]
    assert [x.split(";")[0] for x in dataset.bad] == [
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
        assert cut.dropped == 3 - len(kept)
        assert cut.truncated == sum(len(whole[name][0]) > length for name in kept)
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
    alone = load_dataset(path, tokenizer, 128)
    assert alone.truncated and len(alone) == 700
    packed = load_dataset(path, tokenizer, 128, pack=True)
    check_types(packed, 128)
    assert segments(packed) == segments(alone)  # every record once
    for name in ("truncated", "dropped", "bad", "empty"):
        assert getattr(packed, name) == getattr(alone, name)
    assert (packed.tokens[packed.segment_ids == 0] == tokenizer.pad_id).all()
    assert len(packed) < 500
    used = np.mean(packed.segment_ids > 0)
    assert used > 0.9 > 0.7 > np.mean(alone.segment_ids > 0)
    firsts = [int(packed.records(row)[0].split(":")[-1]) for row in range(len(packed))]
    assert firsts == sorted(firsts)
    again = load_dataset(path, tokenizer, 128, pack=True)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(again, name), getattr(packed, name))


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
    assert (len(whole), whole.truncated, whole.dropped) == (1319, 0, 0)
    assert list(segments(whole).values()) == [
        as_before(stories_tokenizer, line["question"], line["answer"]) for line in lines
    ]
    packed = load_dataset(path, stories_tokenizer, 1200, pack=True)
    assert segments(packed) == segments(whole)
    assert np.mean(packed.segment_ids > 0) > 0.9
    cut = load_dataset(path, stories_tokenizer, 256)
    assert len(cut) + cut.dropped == 1319 and cut.dropped
    kept = whole.loss_mask[:, :256].any(axis=1)
    for name in FIELDS:
        cut_whole = getattr(whole, name)[kept, :256]
        np.testing.assert_array_equal(getattr(cut, name), cut_whole)


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
            assert (dataset.truncated, dataset.dropped, dataset.bad) == (0, 0, ())
            width = length - len(start)
            windows = [ids[i : i + width] for i in range(0, len(ids), width)]
            used = dataset.segment_ids == 1
            assert [
                row[use].tolist() for row, use in zip(dataset.tokens, used, strict=True)
            ] == [start + window for window in windows]
            assert (dataset.tokens[~used] == tk.pad_id).all()
            np.testing.assert_array_equal(dataset.loss_mask[:, 1:], used[:, 1:])
            assert not dataset.loss_mask[:, 0].any()
            np.testing.assert_array_equal(
                dataset.positions, np.where(used, np.arange(length)[None], 0)
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
            dataset.tokens[: row + 1][dataset.loss_mask[: row + 1]]
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


def numbered(count, first=0):
    """Rows that can be told apart, by all of their arrays."""
    tokens = np.arange(3 * count, dtype=np.int32).reshape(count, 3) + 300 + 3 * first
    names = [[f"file:{first + i}"] for i in range(count)]
    return Dataset(tokens, tokens % 2 == 0, tokens // 2, tokens // 3, names)


def rows_of(batches):
    """The rows in batches of datasets that were `numbered` one after the other."""
    for batch in batches:
        assert list(batch) == [*FIELDS, "row"]
        tokens = batch["tokens"]
        np.testing.assert_array_equal(batch["loss_mask"], tokens % 2 == 0)
        np.testing.assert_array_equal(batch["segment_ids"], tokens // 2)
        np.testing.assert_array_equal(batch["positions"], tokens // 3)
        np.testing.assert_array_equal(batch["row"], (tokens[:, 0] - 300) // 3)
        dtypes = [np.int32, bool, np.int32, np.int32, np.int32]
        assert [array.dtype for array in batch.values()] == dtypes
        yield batch["row"].tolist()


def take(count, batch_size, seed, sizes=(11,), weights=(1,), **processes):
    firsts = np.cumsum([0, *sizes]).tolist()
    datasets = [numbered(*x) for x in zip(sizes, firsts, strict=False)]
    batches = training_batches(datasets, weights, batch_size, seed, **processes)
    return list(rows_of(islice(batches, count)))


def test_shuffled_batches():
    batches = take(44, 3, 5, (33,))
    assert {len(batch) for batch in batches} == {3}
    rows = list(chain(*batches))
    epochs = [rows[i : i + 33] for i in range(0, 132, 33)]
    assert all(sorted(epoch) == list(range(33)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert take(44, 3, 5, (33,)) == batches
    # Neither another seed nor its next epochs begin with the same order.
    others = [take(44, 3, seed, (33,)) for seed in (4, 6, 7)]
    for other in others:
        rows = list(chain(*other))
        found = {tuple(rows[i : i + 33]) for i in range(0, 132, 33)}
        assert not found.intersection(tuple(epoch) for epoch in epochs)


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (3, 8), (5, 5), (4, 1)])
def test_batch_sizes(rows, batch_size):
    batches = take(3 * rows, batch_size, seed=0, sizes=(rows,))
    assert {len(batch) for batch in batches} == {batch_size}
    assert Counter(chain(*batches)) == dict.fromkeys(range(rows), 3 * batch_size)


def test_mixed_batches():
    sizes, weights = (40, 35, 53), (1, 0.5, 2.5)
    batches = take(100, 8, 3, sizes, weights)
    ends = np.cumsum(sizes)
    counts = Counter(
        np.searchsorted(ends, list(chain(*batches)), side="right").tolist()
    )
    assert counts == {0: 200, 1: 100, 2: 500}
    for batch in batches:  # at all times, and not only in the end
        of_first = np.sum(np.array(batch) < 40)
        assert 1 <= of_first <= 3
    for d, size in enumerate(sizes):  # each in epochs of its own
        rows = [r for r in chain(*batches) if np.searchsorted(ends, r, "right") == d]
        for i in range(0, len(rows) - size, size):
            assert len(set(rows[i : i + size])) == size
    assert take(9, 8, 3, sizes, (2, 1, 5)) == take(9, 8, 3, sizes, weights)


def test_records_of_rows():
    datasets = [numbered(4), numbered(2, 4), numbered(5, 6)]
    for row in range(11):
        assert records_of(datasets, np.int32(row)) == [f"file:{row}"]
    assert numbered(3).records(np.int32(2)) == ["file:2"]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes(count):
    sizes, weights = (50, 19), (1, 2)
    whole = take(8, 12, 7, sizes, weights)
    parts = [
        take(8, 12, 7, sizes, weights, process_index=i, process_count=count)
        for i in range(count)
    ]
    assert [list(chain(*batches)) for batches in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("steps", [0, 1, 4, 29])
def test_resumption(steps):
    """In the middle of epochs, and with other processes than before."""
    datasets, weights = [numbered(31), numbered(27, 31)], (3, 1)

    def batches(**processes):
        return training_batches(datasets, weights, 4, 1, **processes)

    first = batches()
    list(islice(first, steps))
    state = json.loads(json.dumps(first.get_state()))
    expected = list(islice(first, 20))
    for used in (batches(), batches(process_index=1, process_count=2)):
        assert len(list(islice(used, 3))) == 3
        used.set_state(state)
        local = slice(None) if len(next(used)["row"]) == 4 else slice(2, 4)
        used.set_state(state)
        for found, batch in zip(islice(used, 20), expected, strict=True):
            for name, array in batch.items():
                np.testing.assert_array_equal(found[name], array[local])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 0},
            "batch_size must be 1 or more times the 1 processes, got 0",
        ),
        (
            {"batch_size": 3, "process_count": 2},
            "batch_size must be 1 or more times the 2 processes, got 3",
        ),
        ({"process_count": 0}, "process_count must be 1 or above, got 0"),
        (
            {"process_index": 2, "process_count": 2},
            "process_index must be 0 to 1, got 2",
        ),
        ({"process_index": -1}, "process_index must be 0 to 0, got -1"),
        ({"seed": -1}, "seed must be 0 or above, got -1"),
        ({"weights": [1, 1]}, "datasets and weights must be as many, 1 or more, got 1"),
        ({"datasets": [], "weights": []}, "1 or more, got 0 and 0"),
        ({"weights": [0]}, "weights must be above 0 and finite, got [0]"),
        ({"weights": [float("nan")]}, "weights must be above 0 and finite, got [nan]"),
        ({"weights": [float("inf")]}, "weights must be above 0 and finite, got [inf]"),
        ({"datasets": [numbered(0)]}, "datasets must have 1 row or more, got [0]"),
        (
            {"datasets": [numbered(2)] * 2, "weights": [1e-3, 2e3]},
            "weights must be at most 1,000,000 times each other, got [0.001, 2000.0]",
        ),
        (
            {
                "datasets": [
                    numbered(2),
                    Dataset(*[np.ones((2, 4), np.int32)] * 4, []),
                ],
                "weights": [1, 1],
            },
            "datasets must have rows of one length, got [3, 4]",
        ),
    ],
)
def test_bad_batches(changes, message):
    arguments = {"datasets": [numbered(11)], "weights": [1], "batch_size": 2, "seed": 0}
    with refused(message):
        training_batches(**arguments | changes)
    shared = {"batch_size", "process_index", "process_count"}
    if shared.issuperset(changes):
        with refused(message):
            ordered_batches(numbered(11), **{"batch_size": 2} | changes)


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("count", [8, 9, 3, 0])
def test_ordered_batches(count, process_count):
    dataset = numbered(count)
    parts = [
        list(ordered_batches(dataset, 4, i, process_count))
        for i in range(process_count)
    ]
    assert {len(part) for part in parts} == {-(-count // 4)}
    rows = []
    for batches in zip(*parts, strict=True):
        for batch in batches:
            filled = batch["row"] < 0
            assert len(filled) == 4 // process_count
            assert batch["row"].dtype == batch["tokens"].dtype == np.int32
            real = {name: array[~filled] for name, array in batch.items()}
            rows += chain(*rows_of([real]))
            assert not batch["loss_mask"][filled].any()
            assert not batch["segment_ids"][filled].any()
            assert not batch["positions"][filled].any()
    assert rows == list(range(count))
    assert dataset.tokens.tolist() == numbered(count).tokens.tolist()
