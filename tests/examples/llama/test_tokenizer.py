"""llama2.c's tokenizer: the ids are its own, and what is refused."""

import itertools
import json
import math
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from examples.llama.tokenizer import load_llama2c_tokenizer
from tests.examples.llama.llama2c_files import BASE, refused, write_tokenizer

WORDS = [
    " t",
    "he",
    " the",
    "\n\n",
    "aa",
    "aaa",
    "ba",
    "aba",
    " <",
    "s>",
    "<s",
    "é",
    "<",
]
LETTERS = [*" abcdehst\n>", "▁"]


def read_tokenizer(path):
    data, offset, pieces, scores = path.read_bytes(), 4, [], []
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        pieces.append(data[offset + 8 : offset + 8 + length].decode())
        scores.append(score)
        offset += 8 + length
    return pieces, scores


def reference_encode(pieces, scores, text):
    """llama2.c's algorithm, as shared/data/README.md describes it."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    if not text:
        return []
    tokens = []
    for character in " " + text:
        fallback = [byte + 3 for byte in character.encode()]
        tokens += [ids[character]] if character in ids else fallback
    while True:
        best = -math.inf
        for i, (left, right) in enumerate(itertools.pairwise(tokens)):
            merged = ids.get(pieces[left] + pieces[right])
            if merged is not None and scores[merged] > best:
                best, place, token = scores[merged], i, merged
        if best == -math.inf:
            return tokens
        tokens[place : place + 2] = [token]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tok.bin"
    write_tokenizer(path, ["<unk>", *BASE, *WORDS, *LETTERS])
    return load_llama2c_tokenizer(path), *read_tokenizer(path)


PARTS = [*" abhest<>/\n0x▁é🙂\0", "<s>", "</s>", "<0x0A>", "the", " and", "aaa"]
tricky = st.text() | st.lists(st.sampled_from(PARTS), max_size=30).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=tricky)
def test_tokenizer_small(small, text):
    tokenizer, pieces, scores = small
    ids = tokenizer.encode(text).ids
    assert ids == reference_encode(pieces, scores, text)
    assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=150)
@given(text=tricky)
def test_tokenizer_real(data_dir, stories_tokenizer, text):
    ids = stories_tokenizer.encode(text).ids
    assert ids == reference_encode(*read_tokenizer(data_dir / "tok512.bin"), text)
    assert stories_tokenizer.decode(ids) == text


def test_tokenizer_real_texts(data_dir, stories_tokenizer):
    pieces, scores = read_tokenizer(data_dir / "tok512.bin")
    lines = (data_dir / "gsm8k_test.jsonl").read_text().splitlines()[:150]
    records = [json.loads(line) for line in lines]
    stories = (data_dir / "tinystories_excerpt.txt").read_text()
    texts = [record[field] for record in records for field in ("question", "answer")]
    texts += [stories[i * 300 : i * 300 + 300] for i in range(150)]
    for text in texts:
        ids = stories_tokenizer.encode(text).ids
        assert ids == reference_encode(pieces, scores, text)
        assert stories_tokenizer.decode(ids) == text


def test_tokenizer_any_vocabulary(tmp_path):
    """Merged tokens with several splits, and runs of one letter, agree as well."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        letters = "abc"[: rng.integers(1, 4)]
        words = {"".join(rng.choice(list(letters), rng.integers(2, 7)))
                 for _ in range(rng.integers(2, 25))}  # fmt: skip
        words = list(rng.permutation(sorted(words)))
        pieces = ["<unk>", *BASE, *words, *letters, " "]
        path = write_tokenizer(tmp_path / "tok.bin", pieces)
        tokenizer = load_llama2c_tokenizer(path)
        for _ in range(10):
            text = "".join(rng.choice(list(letters), rng.integers(3, 30)))
            expected = reference_encode(*read_tokenizer(path), text)
            assert tokenizer.encode(text).ids == expected


@pytest.mark.parametrize("text", ["<s>", "</s> <s>x", "<unk>", "\n<s>\n", "<0x0A>"])
def test_no_text_is_a_special_token(small, text):
    copies = pickle.loads(pickle.dumps(small[0])), Tokenizer.from_str(small[0].to_str())
    for tokenizer in (small[0], *copies):
        ids = tokenizer.encode(text).ids
        assert min(ids) >= 3
        assert tokenizer.decode([1, *ids, 2, 1, 0]) == text
        assert [tokenizer.id_to_token(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]


def test_tokenizer_size(tmp_path):
    path = write_tokenizer(tmp_path / "tok.bin", ["<unk>", *BASE, "a"])
    assert load_llama2c_tokenizer(path, vocab_size=260).get_vocab_size() == 260
    with refused(f"{path}: 260 tokens, expected the model's vocab_size, 512"):
        load_llama2c_tokenizer(path, vocab_size=512)


@pytest.mark.parametrize(
    ("pieces", "scores", "longest", "message"),
    [
        ([*BASE, "a"], None, None, "token 3 is '<0x01>', expected '<0x00>'"),
        (["<unk>", *BASE[:100]], None, None, "token 101 is missing, expected '<0x62>'"),
        (["<unk>", *BASE, "ab", "ab"], None, None, "token 'ab' occurs twice"),
        (
            ["<unk>", *BASE, "ab", "ba", "a", "b"],
            [0.0] * 261 + [-1.0, -2.0],
            None,
            "tokens 'ba' and 'ab' have the same score, 0.0; expected distinct scores",
        ),
        (
            ["<unk>", *BASE, "abcdefghij"],
            None,
            6,
            "token 259 at byte 3628 has length 10 and score -0.0, expected 0 to 6 and "
            "a number: not a llama2.c tokenizer",
        ),
        (
            ["<unk>", *BASE, "a"],
            [0.0] * 259 + [math.nan],
            None,
            "has length 1 and score nan",
        ),
    ],
)
def test_tokenizer_refused(tmp_path, pieces, scores, longest, message):
    path = write_tokenizer(tmp_path / "tok.bin", pieces, scores, longest)
    with refused(message):
        load_llama2c_tokenizer(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x07", "1 bytes, expected 4 or more"),
        (bytes(8), "longest token length is 0, expected 1 to 65536: not a llama2.c"),
        (b"\x07\0\0\0", "token 3 is missing, expected '<0x00>'"),
        (b"\x07\0\0\0\0\0\0\0\x05", "token 0 at byte 4 is truncated, the file has 9"),
        (struct.pack("<ifi", 7, 0.0, 5) + b"<un", "token 0 at byte 4 is truncated"),
        (struct.pack("<ifi", 7, 0.0, -1) + b"<unk>", "token 0 at byte 4 has length -1"),
        (struct.pack("<ifi", 7, 0.0, 1) + b"\xff", "token 0 at byte 4 is not UTF-8"),
        (b'{"version": "1.0", "model": {}}', "longest token length is 1702240891"),
    ],
)
def test_tokenizer_damaged(tmp_path, data, message):
    path = tmp_path / "tok.bin"
    path.write_bytes(data)
    with refused(f"{path}: {message}"):
        load_llama2c_tokenizer(path)


def test_tokenizer_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_llama2c_tokenizer(tmp_path / "nothing")
