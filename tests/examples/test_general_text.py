"""The text that stands for what models are pretrained on."""

import pytest

from examples.general_text import FILE, general_text, write_general_text
from examples.llama.text.rows import load_text
from examples.llama.text.tokenizer import load_tokenizer
from tests.examples.llama.runs import write_files


def test_half_is_english_and_half_is_code():
    text = general_text(3000)
    assert len(text) == 2 * 3000 + 3
    english, code = text[:3000], text[3002:]
    assert "statement" in english and "def " not in english[:1000]
    assert code.startswith('"""') and "def " in general_text(12_000)[12_000:]
    assert general_text(3000) == text


def test_bad_length():
    for characters in (0, 10**9):
        message = rf"characters must be 1 to \d+, got {characters}"
        with pytest.raises(ValueError, match=message):
            general_text(characters)


def test_is_retained_text(tmp_path):
    write_general_text(tmp_path)
    assert (tmp_path / FILE).read_text(encoding="utf-8") == general_text()
    tokenizer = load_tokenizer(write_files(tmp_path)["model"])
    rows = load_text(tmp_path / FILE, tokenizer, 64)
    assert rows.take()["loss_mask"].sum() > 20_000
