"""Tokens, masks and batches against the texts that they come from."""

import json
import re
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.llama.data import (
    PAD,
    Dataset,
    load_gsm8k,
    load_text,
    ordered_batches,
    read_gsm8k,
    shuffled_batches,
    tokenize,
)
from examples.llama.tokenizer import END, START, load_llama2c_tokenizer
from tests.examples.llama.llama2c_files import BASE, write_tokenizer

PIECES = [*" <|>aensrtu4", "s>", "an", " a", " an", "ans", "us", "er"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.bin"
    return load_llama2c_tokenizer(write_tokenizer(path, ["<unk>", *BASE, *PIECES]))


def text_of(ids, tokenizer):
    """The text of ordinary ids, by their pieces alone, less the space in front."""
    parts = []
    for i in ids:
        assert i not in (PAD, START, END)
        byte = 3 <= i < 259
        parts.append(bytes([i - 3]) if byte else tokenizer.id_to_token(i).encode())
    return b"".join(parts).decode().removeprefix(" ")


def unpadded(tokens):
    return tokens[: np.flatnonzero(tokens != PAD)[-1] + 1].tolist()


def write_lines(path, *pairs):
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs]
    path.write_text("".join(lines))
    return path


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
awkward = st.sampled_from(["", " ", "\n", "</s>", "<s>", "<unk>", "<0x0A>", "🙂", " 4"])


@given(question=texts | awkward, answer=texts | awkward)
def test_format(tokenizer, question, answer):
    dataset = tokenize([(question, answer)], tokenizer, max_length=200)
    assert dataset.tokens.dtype == np.int32 and dataset.mask.dtype == bool
    assert dataset.tokens.shape == dataset.mask.shape == (1, 200)
    assert (dataset.truncated, dataset.dropped) == (0, 0)
    ids, mask = unpadded(dataset.tokens[0]), dataset.mask[0].tolist()
    counted = [i for i, token in enumerate(mask) if token]
    first, last = counted[0], counted[-1]
    assert counted == list(range(first, last + 1))  # an answer is in one piece
    prompt = f"<|user|>\n{question}\n<|assistant|>\n"
    assert ids[0] == START and ids[last] == END
    assert text_of(ids[1:first], tokenizer) == prompt
    assert text_of(ids[1:last], tokenizer) == prompt + answer
    assert text_of([*ids[1:last], *ids[last + 1 :]], tokenizer) == f"{prompt}{answer}\n"
    # As generate.py has it, of which the model is to continue.
    assert ids[1:first] == tokenizer.encode(prompt).ids


def test_truncation(tokenizer):
    pairs = [("us", "an"), ("", "4" * 9), ("an answer", "")]
    whole = tokenize(pairs, tokenizer, max_length=100)
    lengths = [len(unpadded(row)) for row in whole.tokens]
    first = whole.mask.argmax(axis=1)  # the tokens before the answer
    assert len(set(lengths)) == len(set(first)) == 3
    for length in range(2, max(lengths) + 2):
        cut = tokenize(pairs, tokenizer, length)
        kept = np.flatnonzero(first < length)
        np.testing.assert_array_equal(cut.tokens, whole.tokens[kept, :length])
        np.testing.assert_array_equal(cut.mask, whole.mask[kept, :length])
        assert cut.dropped == 3 - len(kept)
        assert cut.truncated == sum(lengths[i] > length for i in kept)


def test_gsm8k_files(tokenizer, tmp_path):
    pairs = [("a", "4"), ("b\n", "x\u2028y"), ("c", "🙂")]
    path = write_lines(tmp_path / "some.jsonl", *pairs)
    assert read_gsm8k(path) == pairs
    # Blank lines, further fields, no line break at the end, all of UTF-8.
    lines = [json.dumps({"answer": a, "question": q, "id": 1}) for q, a in pairs]
    path.write_text("\n" + "\n \r\n".join(lines), encoding="utf-8")
    assert read_gsm8k(str(path)) == pairs
    expected = tokenize(pairs, tokenizer, 40)
    for found, array in zip(load_gsm8k(path, tokenizer, 40), expected, strict=True):
        np.testing.assert_array_equal(found, array)


def test_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("an answer.\r\n\n<s>🙂 4</s>\n".encode())
    ids = tokenizer.encode(path.read_bytes().decode()).ids
    assert len(ids) % 6 and START not in ids and END not in ids
    for length in (2, 7, len(ids) + 1, len(ids) + 9):
        dataset = load_text(path, tokenizer, length)
        assert dataset.tokens.dtype == np.int32 and dataset.mask.dtype == bool
        rows = -(-len(ids) // (length - 1))
        assert dataset.tokens.shape == dataset.mask.shape == (rows, length)
        assert (dataset.tokens[:, 0] == START).all()
        assert not dataset.mask[:, 0].any()
        assert dataset.tokens[dataset.mask].tolist() == ids
        assert (dataset.tokens[:, 1:][~dataset.mask[:, 1:]] == PAD).all()


ALLOWED = '; expected a JSON object with the texts "question" and "answer"'
GOOD = b'{"question": "a", "answer": "b"}\n'


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", 1, "no record in the file" + ALLOWED),
        (b"\n \n", 1, "no record in the file" + ALLOWED),
        (GOOD + b'{"question": "a"', 2, "Expecting ',' delimiter: line 1 column 17"),
        (GOOD + b"\n\nnonsense\n", 4, "Expecting value: line 1 column 1 (char 0)"),
        (b"[" * 100_000, 1, "recursion"),
        (GOOD + b'["question", "answer"]', 2, "list found" + ALLOWED),
        (GOOD + b'"question"', 2, "str found" + ALLOWED),
        (b'{"question": "a"}', 1, '"answer" is missing' + ALLOWED),
        (b'{"query": "a", "answer": "b"}', 1, '"question" is missing' + ALLOWED),
        (b'{"question": 1, "answer": "b"}', 1, '"question" is int' + ALLOWED),
        (b'{"question": "a", "answer": null}', 1, '"answer" is NoneType' + ALLOWED),
        (b'{"question": "a", "answer": "\\ud83d"}', 1, "surrogates not allowed"),
        (GOOD + b'{"question": "\xff"', 2, "can't decode byte 0xff in position 14"),
    ],
)
def test_malformed_records(tmp_path, content, line, message):
    path = tmp_path / "some.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_gsm8k(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert "expected" in str(caught.value)


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
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        load_text(path, tokenizer, 8)


def test_lengths_too_short(tokenizer, tmp_path):
    path = write_lines(tmp_path / "some.jsonl", ("an answer", "4"), ("us", "4"))
    for load in (load_gsm8k, load_text):
        with pytest.raises(ValueError, match="max_length must be 2 or above, got 1"):
            load(path, tokenizer, 1)
    message = f"{path}: none of 2 records has an answer token within max_length 5"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_gsm8k(path, tokenizer, 5)
    for load in (load_gsm8k, load_text):
        with pytest.raises(FileNotFoundError, match="absent"):
            load(tmp_path / "absent", tokenizer, 8)


def numbered(count):
    """Examples that can be told apart by their tokens, in rows of 3."""
    tokens = np.arange(3 * count, dtype=np.int32).reshape(count, 3) + 300
    return Dataset(tokens, tokens % 2 == 0)


def rows_of(batches):
    """The examples' numbers in batches of `numbered`, whose masks must fit."""
    for tokens, mask in batches:
        np.testing.assert_array_equal(mask, tokens % 2 == 0)
        yield ((tokens[:, 0] - 300) // 3).tolist()


def test_shuffled_batches():
    def take(count, batch_size, seed):
        batches = shuffled_batches(numbered(11), batch_size, seed)
        return list(rows_of(islice(batches, count)))

    batches = take(40, 3, seed=5)
    assert {len(batch) for batch in batches} == {3}
    epochs = [list(chain(*batches[i : i + 3])) for i in range(0, 39, 3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 13
    left_out = [set(range(11)) - set(epoch) for epoch in epochs]
    assert set.union(*left_out) > left_out[0]
    assert take(40, 3, seed=5) == batches != take(40, 3, seed=6)
    assert [sorted(batch) for batch in take(2, 11, seed=0)] == [list(range(11))] * 2


@pytest.mark.parametrize(
    ("batch_size", "seed", "message"),
    [
        (0, 0, "batch_size must be 1 to 11 examples, got 0"),
        (12, 0, "batch_size must be 1 to 11 examples, got 12"),
        (2, -1, "seed must be 0 or above, got -1"),
    ],
)
def test_bad_batches(batch_size, seed, message):
    with pytest.raises(ValueError, match=message):
        shuffled_batches(numbered(11), batch_size, seed)


@pytest.mark.parametrize(("count", "sizes"), [(8, (4, 4)), (9, (4, 4, 1)), (3, (3,))])
def test_ordered_batches(count, sizes):
    dataset = numbered(count)
    batches = list(ordered_batches(dataset, 4))
    assert [tokens.shape for tokens, _ in batches] == [(4, 3)] * len(sizes)
    real = [
        (tokens[:size], mask[:size])
        for (tokens, mask), size in zip(batches, sizes, strict=True)
    ]
    assert list(chain(*rows_of(real))) == list(range(count))
    last_tokens, last_mask = batches[-1]
    assert (last_tokens[sizes[-1] :] == PAD).all()
    assert not last_mask[sizes[-1] :].any()


def test_real_records(data_dir, stories_tokenizer):
    path = data_dir / "gsm8k_test.jsonl"
    pairs = read_gsm8k(path)
    assert len(pairs) == 1319
    whole = tokenize(pairs, stories_tokenizer, max_length=1200)
    assert (whole.truncated, whole.dropped) == (0, 0)
    for tokens, mask, (question, answer) in zip(*whole[:2], pairs, strict=True):
        first, ids = int(mask.argmax()), unpadded(tokens)
        prompt = f"<|user|>\n{question}\n<|assistant|>\n"
        assert ids[1:first] == stories_tokenizer.encode(prompt).ids
        *answer_ids, end = tokens[mask].tolist()
        assert end == END and text_of(answer_ids, stories_tokenizer) == answer
    cut = load_gsm8k(path, stories_tokenizer, 256)
    assert len(cut.tokens) + cut.dropped == 1319
    np.testing.assert_array_equal(
        cut.tokens, whole.tokens[whole.mask[:, :256].any(axis=1), :256]
    )
