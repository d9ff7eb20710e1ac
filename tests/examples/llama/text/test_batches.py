"""Batches of rows: their order, its resumption, processes, padding."""

import json
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest

from examples.llama.text.batches import ordered_batches, records_of, training_batches
from examples.llama.text.dataset import FIELDS, in_memory, row_of_record
from tests.examples.llama.checkpoints.llama2c_files import refused


def numbered(count, first=0):
    """Rows of 1 to 3 tokens that can be told apart."""
    rows = []
    for i in range(first, first + count):
        tokens = np.arange(3 * i, 3 * i + 1 + i % 3) + 300
        rows.append(row_of_record(tokens, tokens % 2 == 0, f"file:{i}"))
    return in_memory(rows, 3, 7)


def rows_of(batches):
    """The rows in batches of datasets that were `numbered` one after the other."""
    for batch in batches:
        assert list(batch) == [*FIELDS, "row"]
        tokens = batch["tokens"]
        rows = (tokens[:, :1] - 300) // 3
        np.testing.assert_array_equal(batch["row"], rows[:, 0])
        used = np.arange(3) <= rows % 3
        np.testing.assert_array_equal(batch["loss_mask"], used & (tokens % 2 == 0))
        np.testing.assert_array_equal(batch["segment_ids"], used)
        np.testing.assert_array_equal(batch["positions"], used * np.arange(3))
        np.testing.assert_array_equal(tokens[~used], 7)
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
                    in_memory([row_of_record(np.ones(1), np.ones(1), "file:1")], 4, 0),
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
