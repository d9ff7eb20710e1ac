"""Rows of large data: in a file, made once, in little memory."""

import json
import resource
import signal
import subprocess
import sys
import threading

import chex
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from examples.llama.text import rows
from examples.llama.text.batches import training_batches
from examples.llama.text.dataset import Outcome, Row, RowWriter
from examples.llama.text.rows import load_dataset
from examples.llama.text.tokenizer import Tokenizer, load_tokenizer
from tests.examples.llama.checkpoints.llama2c_files import refused, write_tokenizer
from tests.examples.llama.text.tokenizer_files import TINY


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """Loads data whose rows go to a file, however few they are."""
    monkeypatch.setattr(rows, "IN_MEMORY", 0)

    def load(path, tokenizer, length=48, **options):
        return load_dataset(
            path, tokenizer, length, cache_dir=tmp_path / "cache", **options
        )

    return load


def write_pairs(path, count, first=0):
    lines = [
        json.dumps({"question": "an" * (i % 7), "answer": f"{'4' * (i % 11)} an{i}"})
        for i in range(first, first + count)
    ]
    path.write_text("\n".join(lines))
    return path


def files(tmp_path, suffix=".arrow"):
    return sorted((tmp_path / "cache").glob(f"*{suffix}"))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("count", [3, 1024, 2500])
def test_the_same_rows(tokenizer, on_disk, tmp_path, pack, count):
    """As those in memory, also where a file's last part is full or empty."""
    path = write_pairs(tmp_path / "some.jsonl", count)
    expected = load_dataset(path, tokenizer, 48, pack=pack)
    for found in (on_disk(path, tokenizer, pack=pack) for _ in range(2)):
        assert len(found) == len(expected) > 0
        chex.assert_trees_all_equal(found.take(), expected.take())
        assert found.highest == expected.highest == found.take()["tokens"].max()
        assert found.outcome == expected.outcome
        for row in (0, len(found) // 2, len(found) - 1):
            assert found.records(row) == expected.records(row) == found[row].sources
        batches = [training_batches([x], [1], 5, 7) for x in (found, expected)]
        for _ in range(4):
            chex.assert_trees_all_equal(*map(next, batches))
    assert len(files(tmp_path)) == 1


def test_made_once(tokenizer, on_disk, tmp_path):
    path = write_pairs(tmp_path / "some.jsonl", 20)
    on_disk(path, tokenizer)
    (file,) = files(tmp_path)
    made = file.stat()
    on_disk(path, tokenizer)
    assert file.stat() == made
    other = load_tokenizer(write_tokenizer(tmp_path / "other.bin", [*TINY, "aa"]))
    on_disk(path, tokenizer, 32)
    on_disk(path, tokenizer, pack=True)
    on_disk(path, tokenizer, skip_bad=True)
    on_disk(path, other)
    write_pairs(path, 21)
    assert len(on_disk(path, tokenizer)) == 21
    assert len(files(tmp_path)) == 6


def test_small_data_needs_no_file(tokenizer, tmp_path):
    path = write_pairs(tmp_path / "some.jsonl", 20)
    load_dataset(path, tokenizer, 48, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "a flipped bit", "no digest"])
def test_a_damaged_file_is_made_again(tokenizer, on_disk, tmp_path, damage):
    path = write_pairs(tmp_path / "some.jsonl", 20)
    expected = on_disk(path, tokenizer).take()
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.unlink()  # it is mapped
    flipped = whole[:900] + bytes([whole[900] ^ 1]) + whole[901:]
    contents = {"empty": b"", "cut": whole[:-1], "a flipped bit": flipped}
    file.write_bytes(contents.get(damage, whole))
    if damage == "no digest":
        file.with_suffix(".sha256").unlink()
    chex.assert_trees_all_equal(on_disk(path, tokenizer).take(), expected)
    assert file.read_bytes() == whole


def test_bad_records_leave_no_file(tokenizer, on_disk, tmp_path):
    path = write_pairs(tmp_path / "some.jsonl", 2000)
    path.write_text(path.read_text() + "\nnonsense\n")
    with refused(f"{path}, line 2001: Expecting value at column 1"):
        on_disk(path, tokenizer)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]
    with refused(f"{path}: none of 2000 records has a token to learn within max_len"):
        on_disk(path, tokenizer, 3, skip_bad=True)
    assert not files(tmp_path)
    found = on_disk(path, tokenizer, skip_bad=True)
    assert len(found) == 2000 and found.outcome.bad.number == 1


def test_a_full_disk(tokenizer, on_disk, tmp_path):
    path = write_pairs(tmp_path / "some.jsonl", 2000)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*\.arrow"):
            on_disk(path, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(on_disk(path, tokenizer)) == 2000


KILLED = """
import os, signal, sys
from pathlib import Path
from examples.llama.text import rows
from examples.llama.text.tokenizer import load_tokenizer

data, tokenizer, cache = map(Path, sys.argv[1:])
rows.IN_MEMORY = 0
make = rows.replacing

class Replacing:  # kills the process when the file is written, but not in its place
    def __init__(self, path):
        self.inside = make(path)
    def __enter__(self):
        return self.inside.__enter__()
    def __exit__(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)

rows.replacing = Replacing
rows.load_dataset(data, load_tokenizer(tokenizer), 48, cache_dir=cache)
"""


def test_a_killed_process(on_disk, tmp_path):
    """What it left is cleared away, and its lock is gone with it."""
    path = write_pairs(tmp_path / "some.jsonl", 20)
    name = write_tokenizer(tmp_path / "tiny.bin", TINY)
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, path, name, cache]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not files(tmp_path) and len(list(cache.iterdir())) == 2
    assert len(on_disk(path, load_tokenizer(name))) == 20
    assert len(files(tmp_path)) == 1 and len(list(cache.iterdir())) == 3


def test_one_process_makes_them(tokenizer, on_disk, tmp_path, monkeypatch):
    """Others wait, and take what it made."""
    path = write_pairs(tmp_path / "some.jsonl", 20)
    inside, going_on = threading.Event(), threading.Event()
    written = []

    class Slow(RowWriter):
        def write(self, row: Row) -> None:
            written.append(row)
            inside.set()
            assert going_on.wait(60)
            super().write(row)

    monkeypatch.setattr(rows, "RowWriter", Slow)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(on_disk(path, tokenizer)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert inside.wait(60)
    going_on.set()
    for thread in threads:
        thread.join(60)
    assert [len(x) for x in found] == [20] * 3 and len(written) == 20


def test_many_files(tokenizer, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in (2, 0, 1):
        write_pairs(data / f"part-{i}.jsonl", 4, 4 * i)
    (data / "README.md").write_text("no records")
    (data / "more.json").write_text('[{"text": "an"}]')
    (data / "sub.jsonl").mkdir()
    every = [f"{data}/part-{i}.jsonl:{line}" for i in range(3) for line in range(1, 5)]
    for name, expected in (
        (data, [f"{data}/more.json:1", *every]),
        (f"{data}/part-*.jsonl", every),
        (f"{data}/part-[12].jsonl", every[4:]),
    ):
        found = load_dataset(name, tokenizer, 64)
        assert [found.records(i)[0] for i in range(len(found))] == expected
    (data / "part-1.jsonl").write_text("{}\n")
    with refused(f"{data}/part-1.jsonl, line 1: fields [] found; expected a JSON obj"):
        load_dataset(data, tokenizer, 64)
    (data / "part-1.jsonl").write_text("")  # one may be empty, but not all
    assert len(load_dataset(f"{data}/part-*.jsonl", tokenizer, 64)) == 8
    (tmp_path / "empty").mkdir()
    with refused(f"{tmp_path}/empty: no file called .jsonl or .json in it; expected f"):
        load_dataset(tmp_path / "empty", tokenizer, 64)
    with refused(f"{data}/*.txt: no file fits this pattern; expected files of records"):
        load_dataset(f"{data}/*.txt", tokenizer, 64)
    (data / "odd[1].jsonl").write_text('{"text": "an"}')  # a name, and no pattern
    assert len(load_dataset(data / "odd[1].jsonl", tokenizer, 64)) == 1


def test_long_texts(tokenizer, llama3, tmp_path):
    """They are cut before they are tokenized, which changes nothing."""
    path = tmp_path / "some.jsonl"
    answer = " ".join(f"an{i} us" for i in range(20_000))
    question = "us " * 30_000
    lines = [
        {"question": "an", "answer": answer},
        {"question": question, "answer": "4"},
        {"text": answer},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for tk in (tokenizer, llama3):
        found = load_dataset(path, tk, 100)
        assert found.outcome == Outcome(truncated=2, dropped=1)
        whole = load_dataset(path, tk, 200_000).take()
        assert (whole["segment_ids"].sum(axis=1) > 20_000).all()
        for name, array in found.take().items():
            np.testing.assert_array_equal(array, whole[name][[0, 2], :100])


def test_long_texts_of_few_tokens(llama3, tmp_path):
    backend = Backend.from_str(llama3.backend.to_str())
    backend.normalizer = normalizers.Replace("~", "")
    tk = Tokenizer(backend, None, llama3.eos_ids, 0)
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"text": "an" + "~" * 300_000 + " answer"}))
    found = load_dataset(path, tk, 100)
    assert found.outcome == Outcome()
    assert tk.decode(found[0].tokens.tolist()) == "an answer"


GROWTH = """
import re, sys
from itertools import islice
from pathlib import Path
from examples.llama.text.batches import training_batches
from examples.llama.text.rows import load_dataset
from examples.llama.text.tokenizer import load_tokenizer

def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

data, tokenizer, cache = map(Path, sys.argv[1:])
tokenizer = load_tokenizer(tokenizer)
before = peak()
dataset = load_dataset(data, tokenizer, 64, cache_dir=cache)
for _ in islice(training_batches([dataset], [1], 64, 0), len(dataset) // 64):
    pass
(rows,) = cache.glob("*.arrow")
print(len(dataset), peak() - before, rows.stat().st_size // 1024)
rows.unlink()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_records(tmp_path):
    """A whole epoch over four times as many records: only their mapped bytes more."""
    name = write_tokenizer(tmp_path / "tiny.bin", TINY)
    grown, mapped = {}, {}
    padding = " " * 1400  # more than is held in memory
    for count in (50_000, 200_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for i in range(count):
                pair = {"question": "4", "answer": str(i)}
                file.write(json.dumps(pair) + padding + "\n")
        command = [sys.executable, "-c", GROWTH, path, name, tmp_path / "cache"]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        rows, grown[count], mapped[count] = map(int, run.stdout.split())
        assert rows == count
        path.unlink()
    more = mapped[200_000] - mapped[50_000]
    assert 0 < grown[200_000] - grown[50_000] < more + 20_000  # kilobytes
