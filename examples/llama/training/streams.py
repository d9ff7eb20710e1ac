"""The batches of a run: what a step learns, and what it may not forget meanwhile."""

from typing import Any, NamedTuple

import jax
import numpy as np

from examples.llama.text.batches import training_batches
from examples.llama.text.dataset import Batch
from examples.llama.training.config import Config
from examples.llama.training.replay import Datasets


class Batches(NamedTuple):
    """The batches of one step, with the rows of this process."""

    batch: Batch  # see Dataset; with "kl_weight" where that is not 0
    memories: list[Batch]  # of earlier tasks, for GEM
    rows: np.ndarray  # int32 [B], of the batch; see records_of


class Streams:
    """An iterator of `Batches` without end, which can be set to where another was."""

    def __init__(self, datasets: Datasets, config: Config):
        def stream(sets: Any, weights: Any, seed: int) -> Any:
            return training_batches(
                sets,
                weights,
                config.batch_size,
                seed,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )

        self._streams = [stream(datasets.training, datasets.weights, config.seed)]
        for i, memory in enumerate(datasets.memories, start=1):
            self._streams.append(stream([memory], [1.0], config.seed + i))
        self._soft_from = datasets.soft_from
        self._kl = config.penalties.get("kl", 0.0)

    def __next__(self) -> Batches:
        batch, *memories = [dict(next(stream)) for stream in self._streams]
        rows = batch.pop("row")
        for memory in memories:
            memory.pop("row")
        if self._kl or self._soft_from is not None:
            mask = batch["loss_mask"]
            soft = np.zeros(mask.shape, bool)
            if self._soft_from is not None:
                soft |= (rows >= self._soft_from)[:, None]
            weight = np.where(soft, 1.0, self._kl) * mask
            batch |= {"loss_mask": mask & ~soft, "kl_weight": np.float32(weight)}
        return Batches(batch, memories, rows)

    def get_state(self) -> Any:
        """The position, for JSON."""
        return [stream.get_state() for stream in self._streams]

    def set_state(self, state: Any) -> None:
        for stream, position in zip(self._streams, state, strict=True):
            stream.set_state(position)
