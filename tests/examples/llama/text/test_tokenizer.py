"""Tokenizers: the ids are their own, and what is refused."""

import copy
import itertools
import json
import math
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from examples.llama.text.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from tests.examples.llama.checkpoints.llama2c_files import (
    BASE,
    refused,
    write_tokenizer,
)
from tests.examples.llama.text.tokenizer_files import (
    CHATML_TEMPLATE,
    TEXTS,
    write_json,
    write_llama2,
    write_llama3,
)

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
    return load_tokenizer(path), *read_tokenizer(path)


PARTS = [*" abhest<>/\n0x▁é🙂\0", "<s>", "</s>", "<0x0A>", "the", " and", "aaa"]
tricky = st.text() | st.lists(st.sampled_from(PARTS), max_size=30).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=tricky)
def test_tokenizer_small(small, text):
    tokenizer, pieces, scores = small
    ids = tokenizer.encode(text)
    assert ids == reference_encode(pieces, scores, text)
    assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=150)
@given(text=tricky)
def test_tokenizer_real(data_dir, stories_tokenizer, text):
    ids = stories_tokenizer.encode(text)
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
        ids = stories_tokenizer.encode(text)
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
        tokenizer = load_tokenizer(path)
        for _ in range(10):
            text = "".join(rng.choice(list(letters), rng.integers(3, 30)))
            expected = reference_encode(*read_tokenizer(path), text)
            assert tokenizer.encode(text) == expected


def test_tokenizer_size(tmp_path):
    path = write_tokenizer(tmp_path / "tok.bin", ["<unk>", *BASE, "a"])
    assert load_tokenizer(path, vocab_size=260).backend.get_vocab_size() == 260
    with refused(f"{path}: 260 tokens, expected the model's vocab_size, 512"):
        load_tokenizer(path, vocab_size=512)


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
        load_tokenizer(path)


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
        (b"\x7fELF", "longest token length is 1179403647, expected 1 to 65536"),
    ],
)
def test_tokenizer_damaged(tmp_path, data, message):
    path = tmp_path / "tok.bin"
    path.write_bytes(data)
    with refused(f"{path}: {message}"):
        load_tokenizer(path)


def test_tokenizer_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_tokenizer(tmp_path / "nothing")


@pytest.fixture(params=["small", "llama2", "llama3"])
def tokenizer(request):
    found = request.getfixturevalue(request.param)
    return found[0] if request.param == "small" else found


SPECIAL = ["<s>", "</s>", "<unk>", "<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>"]
talk = st.lists(
    st.sampled_from([*SPECIAL, *" \n\0aé🙂", "the", " answer", "<|user|>\n", "24"])
    | st.text(max_size=3),
    max_size=12,
).map("".join)


def special_ids(tokenizer):
    backend = Backend.from_str(tokenizer.backend.to_str())
    return {i for i, t in backend.get_added_tokens_decoder().items() if t.special}


@settings(max_examples=100)
@given(text=talk)
def test_text_is_never_a_special_token(llama2, llama3, small, text):
    for tokenizer in (llama2, llama3, small[0]):
        ids = tokenizer.encode(text)
        (encoding,) = tokenizer.encode_batch([text])
        assert encoding.ids == ids
        assert not special_ids(tokenizer).intersection(ids)
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        around = [*start, *ids, *tokenizer.eos_ids, tokenizer.pad_id]
        assert tokenizer.decode(around) == tokenizer.decode(ids) == text


def test_special_tokens_after_a_copy(tokenizer):
    text = "".join(SPECIAL)
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode(text) == tokenizer.encode(text)
        assert not special_ids(other).intersection(other.encode(text))


def test_both_ways_to_encode_at_once(tokenizer):
    bos = tokenizer.backend.id_to_token(tokenizer.bos_id)
    text = f"{bos}the answer " * 200

    def run(chat):
        ids = tokenizer.encode_chat(text).ids if chat else tokenizer.encode(text)
        return ids.count(tokenizer.bos_id)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, [False, True] * 50)) == [0, 200] * 50


def test_names_of_special_tokens(llama2, llama3, small):
    assert (llama2.bos_id, llama2.eos_ids, llama2.pad_id) == (1, (2,), 0)
    assert (small[0].bos_id, small[0].eos_ids, small[0].pad_id) == (1, (2,), 0)
    names = [llama3.backend.id_to_token(i) for i in llama3.eos_ids]
    assert names == ["<|end_of_text|>", "<|eot_id|>"]
    assert llama3.backend.id_to_token(llama3.bos_id) == "<|begin_of_text|>"
    assert llama3.pad_id == llama3.eos_ids[0]  # neither a pad nor an unk token


def test_places_that_name_special_tokens(tmp_path):
    write_llama3(tmp_path, eos_token=None, bos_token=None, chat_template=None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None and tokenizer.chat_template is None
    assert len(tokenizer.eos_ids) == 2  # of generation_config.json alone
    names = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|im_start|>"}}
    write_json(tmp_path / "special_tokens_map.json", names)
    (tmp_path / "chat_template.jinja").write_text("of its own file")
    # The tokenizer.json itself, by another name.
    path = (tmp_path / "tokenizer.json").rename(tmp_path / "other.json")
    tokenizer = load_tokenizer(str(path))
    ids = [tokenizer.eos_ids[0], tokenizer.pad_id]
    assert [tokenizer.backend.id_to_token(i) for i in ids] == [
        "<|im_end|>",
        "<|im_start|>",
    ]
    assert len(tokenizer.eos_ids) == 3
    assert tokenizer.chat_template == "of its own file"
    # tokenizer_config.json comes first; an end token that is named twice counts once.
    names = {"eos_token": "<|eot_id|>"}
    names["chat_template"] = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "the default"},
    ]
    write_json(tmp_path / "tokenizer_config.json", names)
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(path)
    assert tokenizer.backend.id_to_token(tokenizer.eos_ids[0]) == "<|eot_id|>"
    assert len(tokenizer.eos_ids) == 2
    assert tokenizer.chat_template == "the default"


def test_special_tokens_that_are_in_the_vocabulary_alone(tmp_path):
    """Then the library itself would not tell them from text."""
    write_llama2(tmp_path)
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    backend["added_tokens"] = []
    backend["model"]["merges"] += [["<", "s"], ["<s", ">"]]
    backend["model"]["vocab"] |= {x: 500 + i for i, x in enumerate(["<s", "<"])}
    backend["post_processor"] = None
    write_json(tmp_path / "tokenizer.json", backend)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([1, *tokenizer.encode("the"), 2, 0]) == "the"
    assert tokenizer.encode_chat("<s>").ids == [1]


def test_settings_that_would_change_ids_are_off(tmp_path, llama3):
    write_llama3(tmp_path)
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    backend["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    backend["padding"] = {
        "strategy": {"Fixed": 40},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 7,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    write_json(tmp_path / "tokenizer.json", backend)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == llama3.encode(text)
        assert tokenizer.encode_chat(text).ids == llama3.encode(text)


def test_offsets(tokenizer):
    """Of all characters, also of spaces."""
    text = "the answer \n\n is 72"
    (encoding,) = tokenizer.encode_batch([text])
    covered = {i for first, end in encoding.offsets for i in range(first, end)}
    assert covered == set(range(len(text)))


@settings(max_examples=100)
@given(texts=st.lists(st.lists(talk, max_size=4), max_size=3))
def test_pieces(llama2, llama3, small, texts):
    for tokenizer in (llama2, llama3, small[0]):
        found = tokenizer.encode_pieces(texts)
        assert [len(pieces) for pieces in found] == [len(pieces) for pieces in texts]
        for pieces, ids_of_pieces in zip(texts, found, strict=True):
            ids = list(itertools.chain(*ids_of_pieces))
            assert tokenizer.decode(ids) == "".join(pieces)
            if pieces:
                assert ids_of_pieces[0] == tokenizer.encode(pieces[0])


def test_pieces_are_as_in_one_piece(tokenizer):
    """Where no token reaches over a boundary, as at the beginning of a line."""
    lines = [line + "\n" for text in TEXTS for line in text.split("\n") if line]
    whole = "".join(lines)
    (ids,) = tokenizer.encode_pieces([lines])
    assert list(itertools.chain(*ids)) == tokenizer.encode(whole)
    # No space is put in front of those that go on.
    (ids,) = tokenizer.encode_pieces([["the", "the", " the"]])
    assert tokenizer.decode(list(itertools.chain(*ids))) == "thethe the"


def test_pieces_behind_special_tokens(llama2, llama3, small):
    """As transformers has it, which tokenizes what stands between them."""
    for tokenizer in (llama2, llama3, small[0]):
        ids = tokenizer.bos_id, tokenizer.eos_ids[0]
        bos, eos = map(tokenizer.backend.id_to_token, ids)
        pieces = ["the", eos, "", "the" + eos, "an", "\nthe" + bos, "\n"]
        (ids,) = tokenizer.encode_pieces([pieces], chat=True)
        whole = tokenizer.encode_chat("".join(pieces)).ids
        assert list(itertools.chain(*ids)) == whole


CHAT = [
    {"role": "user", "content": "the answer?"},
    {"role": "assistant", "content": "an\n other"},
]


def test_chat_template(llama2, llama3):
    text = llama2.apply_chat_template(CHAT)
    assert text == "<s>[INST] the answer? [/INST] an\n other </s>"
    ids = llama2.encode_chat(text).ids
    assert (ids[0], ids[-1], ids.count(1)) == (1, 2, 1)
    text = llama3.apply_chat_template(CHAT[:1], add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nthe answer?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    tokens = llama3.encode_chat(text).tokens
    assert tokens.count("<|eot_id|>") == tokens.count("<|begin_of_text|>") == 1
    with refused("the chat template fails: TemplateError: roles must alternate"):
        llama2.apply_chat_template(CHAT[1:])


def chat_tokenizer(llama3, template):
    return Tokenizer(llama3.backend, llama3.bos_id, llama3.eos_ids, 0, template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "the answer?"}'),
        ("{{ {'a': '<é>'} | tojson(indent=1) }}", '{\n "a": "<é>"\n}'),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("a{% generation %}{{ bos_token[:2] }}{% endgeneration %}b", "a<|b"),
        ("{% set n = namespace(self=1) %}{% set n.x = 2 %}{{ n.self + n.x }}", "3"),
        ("{{ dict(a=1)['a'] }}{{ undefined_name }}", "1"),
        ("{{ '=' * 3 }}{{ 2 * 3 }}{{ 2**3 }}{{ [1] * 2 }}", "===68[1, 1]"),
        ("  {% if tools is none %}\nx\n  {% endif %}\n", "x\n"),
        (CHATML_TEMPLATE, "<|im_start|>user\nthe answer?<|im_end|>\n"),
    ],
)
def test_chat_template_language(llama3, template, expected):
    tokenizer = chat_tokenizer(llama3, template)
    assert tokenizer.apply_chat_template(CHAT[:1]) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template; expected chat_template.jinja or"),
        ("{% if %}", "the chat template fails: TemplateSyntaxError: Expected an expr"),
        ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError"),
        ("{{ messages[7].role }}", "the chat template fails: UndefinedError"),
        ("{{ messages.append(1) }}", "the chat template fails: SecurityError"),
        ("{{ ''.__class__.__mro__[1] }}", "the chat template fails: SecurityError"),
        (
            "{{ strftime_now.__globals__.json }}",
            "the chat template fails: SecurityError",
        ),
        ("{% set n = namespace(_x=1) %}", "the chat template fails: SecurityError"),
        ("{% include 'x' %}", "the chat template fails: TypeError: no loader"),
        ("{{ 9**9999 }}", "the chat template fails: ValueError: Exceeds the limit"),
    ],
)
def test_chat_template_refused(llama3, template, message):
    with refused(message):
        chat_tokenizer(llama3, template).apply_chat_template(CHAT)


def test_find_special_token(llama2, llama3):
    assert llama2.find_special_token("a </s>") == "</s>"
    assert llama2.find_special_token("<|eot_id|>") is None
    assert llama3.find_special_token("x<|eot_id|>") == "<|eot_id|>"


def test_saved(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    several = {"generation_config.json"} if len(tokenizer.eos_ids) > 1 else set()
    assert names == {"tokenizer.json", "tokenizer_config.json"} | several
    again = load_tokenizer(tmp_path, vocab_size=tokenizer.backend.get_vocab_size() + 7)
    for name in ("bos_id", "eos_ids", "pad_id", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name)
    for text in [*TEXTS, "".join(SPECIAL), "é🙂 \0"]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.encode_chat(text).ids == tokenizer.encode_chat(text).ids
        assert again.decode([again.bos_id, *ids, *again.eos_ids]) == text
        # What other programs get.
        backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
        backend.encode_special_tokens = True
        assert backend.encode(text).ids == [tokenizer.bos_id, *ids]
    save_tokenizer(again, tmp_path)  # over it, and the same
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_saved_real(data_dir, stories_tokenizer, tmp_path):
    save_tokenizer(stories_tokenizer, tmp_path)
    again = load_tokenizer(tmp_path, 512)
    lines = (data_dir / "gsm8k_test.jsonl").read_text().splitlines()[:200]
    texts = [json.loads(line)["answer"] for line in lines]
    texts.append((data_dir / "tinystories_excerpt.txt").read_text())
    for text in texts:
        ids = stories_tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == stories_tokenizer.decode(ids) == text


def test_saved_beside_a_generation_config(llama3, tmp_path):
    path = write_json(tmp_path / "generation_config.json", {"temperature": 0.6})
    save_tokenizer(llama3, tmp_path)
    assert json.loads(path.read_text()) == {"temperature": 0.6}
    with pytest.raises(FileNotFoundError):
        save_tokenizer(llama3, tmp_path / "absent")


def test_vocabulary_sizes(tmp_path, llama2):
    write_llama2(tmp_path)
    size = llama2.backend.get_vocab_size()
    for larger in (size, size + 100):
        assert load_tokenizer(tmp_path, larger).encode("a") == llama2.encode("a")
    path = tmp_path / "tokenizer.json"
    token = llama2.backend.id_to_token(size - 1)
    with refused(
        f"{path}: token {token!r} has id {size - 1}, expected ids below the model's "
        f"vocab_size, {size - 1}"
    ):
        load_tokenizer(tmp_path, size - 1)


CONFIG, ENDS = "tokenizer_config.json", "generation_config.json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer.json",
            "",
            "EOF while parsing a value at line 1 column 0; expected",
        ),
        ("tokenizer.json", '{"model": {}}', "expected a tokenizer.json"),
        ("tokenizer.json", '{"model":' * 9999, "recursion limit exceeded"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
            "tokenizer.json: no tokens, expected a vocabulary",
        ),
        (CONFIG, '{"eos_token":', f"{CONFIG}: Expecting value: line 1"),
        (CONFIG, "[" * 100_000, "recursion"),
        (CONFIG, "[]", f"{CONFIG}: list, expected a JSON object"),
        (CONFIG, b"\xff", f"{CONFIG}: 'utf-8' codec can't decode byte 0xff"),
        (
            CONFIG,
            '{"eos_token": "</t>"}',
            f"{CONFIG}: eos_token is '</t>', expected a token of tokenizer.json",
        ),
        (
            CONFIG,
            '{"bos_token": 1}',
            f'{CONFIG}: bos_token is 1, expected a text or an object with "content"',
        ),
        (CONFIG, '{"pad_token": {"contents": "x"}}', "pad_token is {'contents': 'x'}"),
        (
            CONFIG,
            '{"eos_token": "</s>", "chat_template": 3}',
            f"{CONFIG}: chat_template is int, expected a text or a list of named ones",
        ),
        (CONFIG, "{}", "no end token; expected eos_token in tokenizer_config.json or"),
        ("special_tokens_map.json", '{"eos_token": []}', "map.json: eos_token is []"),
        (
            ENDS,
            '{"eos_token_id": [2, 99999]}',
            f"{ENDS}: eos_token_id is [2, 99999], expected ids of the tokenizer",
        ),
        (ENDS, '{"eos_token_id": true}', f"{ENDS}: eos_token_id is True"),
        (ENDS, '{"eos_token_id": -1}', f"{ENDS}: eos_token_id is -1"),
        (ENDS, '{"eos_token_id": "</s>"}', f"{ENDS}: eos_token_id is '</s>'"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: 'utf-8' codec can't"),
    ],
)
def test_huggingface_damaged(tmp_path, name, content, message):
    write_llama2(tmp_path)
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with refused(message) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@settings(max_examples=150)
@given(data=st.data())
def test_huggingface_damaged_anywhere(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged")
    write_llama2(path)
    name = data.draw(st.sampled_from(["tokenizer.json", CONFIG]))
    text = (path / name).read_bytes()
    place = data.draw(st.integers(0, len(text)))
    length = data.draw(st.sampled_from([0, 1, 9, len(text)]))
    other = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b"}", b"0"]))
    (path / name).write_bytes(text[:place] + other + text[place + length :])
    try:
        assert load_tokenizer(path).bos_id is not None or name == CONFIG
    except ValueError as error:
        assert str(path) in str(error)


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        load_tokenizer(tmp_path / "absent.json")
