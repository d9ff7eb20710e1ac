"""Batches of rows, in a shuffled order that can be resumed, or one after another.

Shapes: B rows of L tokens per batch.
"""

import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from examples.llama.text.dataset import FIELDS, Batch, Dataset

_LARGEST_RATIO = 1_000_000  # of weights
_STEPS = 1 << 40  # so many that no run comes to their end
# Grain has little to do here, as the rows are in memory or mapped into it.
_IN_THIS_THREAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def training_batches(
    datasets: Sequence[Dataset],
    weights: Sequence[float],
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Batches of B = batch_size rows without end, mixed from several datasets.

    Each dataset is shuffled anew whenever all of its rows were seen. The batches
    depend on the arguments alone. Concatenated in the order of their processes, those
    of several processes are the batch of one.

    Args:
      datasets: Where the rows come from, of the same L.
      weights: How many rows each dataset gives in proportion to the others, within
        about one per cent; packed rows count as one each.
      batch_size: B, of all processes together; it may exceed the rows.
      seed: Of the shuffling.
      process_index: Which rows of a batch to give: B / process_count, from
        process_index times as many on.
      process_count: The number of processes, a divisor of B.

    Returns:
      An iterator. A batch's "row" counts on from one dataset to the next; see
      `records_of`. `get_state` gives a dictionary for JSON, after which an iterator of
      the same datasets, weights, batch size and seed resumes by `set_state`, also with
      other processes.

    Raises:
      ValueError: An argument is outside these limits.
    """
    _check_batches(batch_size, process_index, process_count)
    if not datasets or len(datasets) != len(weights):
        raise ValueError(
            f"datasets and weights must be as many, 1 or more, got {len(datasets)} and "
            f"{len(weights)}"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights must be above 0 and finite, got {list(weights)}")
    if max(weights) > _LARGEST_RATIO * min(weights):
        raise ValueError(
            f"weights must be at most {_LARGEST_RATIO:,} times each other, got "
            f"{list(weights)}"
        )
    if not all(len(dataset) for dataset in datasets):
        sizes = [len(dataset) for dataset in datasets]
        raise ValueError(f"datasets must have 1 row or more, got {sizes}")
    lengths = {dataset.length for dataset in datasets}
    if len(lengths) > 1:
        raise ValueError(
            f"datasets must have rows of one length, got {sorted(lengths)}"
        )
    if seed < 0:
        raise ValueError(f"seed must be 0 or above, got {seed}")

    ends = np.cumsum([len(dataset) for dataset in datasets])
    # Grain adds the epoch to a seed, so neighbouring ones would repeat each other.
    seeds = np.random.SeedSequence(seed).generate_state(len(datasets))
    shuffled = [
        grain.MapDataset.range(end - len(dataset), end).shuffle(int(seed)).repeat()
        for dataset, end, seed in zip(datasets, ends.tolist(), seeds, strict=True)
    ]
    mixed = grain.MapDataset.mix(shuffled, list(weights))
    local = batch_size // process_count

    def batch_of(step: int) -> Batch:
        first = step * batch_size + process_index * local
        rows = [mixed[i] for i in range(first, first + local)]
        places = [_place(ends, row) for row in rows]
        taken = [datasets[d].take([row]) for d, row in places]
        batch = {name: np.concatenate([x[name] for x in taken]) for name in FIELDS}
        return batch | {"row": np.array(rows, np.int32)}

    steps = grain.MapDataset.range(_STEPS).map(batch_of)
    return iter(steps.to_iter_dataset(_IN_THIS_THREAD))


def records_of(datasets: Sequence[Dataset], row: int) -> list[str]:
    """The records, as "file:line", in a "row" of `training_batches`."""
    d, row = _place(np.cumsum([len(dataset) for dataset in datasets]), row)
    return datasets[d].records(row)


def ordered_batches(
    dataset: Dataset, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """All rows once, in order, in batches of B = batch_size.

    The last batch is filled up with rows of padding, which are "row" -1. Processes
    share a batch as in `training_batches`.

    Raises:
      ValueError: batch_size is below 1, or no multiple of process_count.
    """
    _check_batches(batch_size, process_index, process_count)
    local = batch_size // process_count

    def generate() -> Iterator[Batch]:
        for start in range(0, len(dataset), batch_size):
            rows = np.arange(start, start + batch_size, dtype=np.int32)
            rows = rows[process_index * local : (process_index + 1) * local]
            rows[rows >= len(dataset)] = -1
            yield dataset.take(rows) | {"row": rows}

    return generate()  # so that a bad argument is raised here, not at the first batch


def _place(ends: np.ndarray, row: int) -> tuple[int, int]:
    """A row of several datasets: which one has it, and where."""
    d = int(np.searchsorted(ends, row, side="right"))
    return d, int(row - (ends[d - 1] if d else 0))


def _check_batches(batch_size: int, process_index: int, process_count: int) -> None:
    if process_count < 1:
        raise ValueError(f"process_count must be 1 or above, got {process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be 0 to {process_count - 1}, got {process_index}"
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be 1 or more times the {process_count} processes, got "
            f"{batch_size}"
        )
