"""Checkpoints of a run, from which it resumes as if nothing had happened."""

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

MARGIN = 1 << 26  # bytes, for metrics and the report


class Checkpoints:
    """The checkpoints under a directory, written in the background by Orbax.

    Each holds `state`, a tree of arrays, and `data`, what the data iterator says of
    its position. One is complete or not there: it is written under another name first.
    """

    def __init__(self, directory: Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,  # of processes killed on the way
            enable_async_checkpointing=True,
        )
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_names=("state", "data"),
        )

    @property
    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    def where(self) -> str:
        """The last good checkpoint, in words."""
        if self.latest is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.directory / str(self.latest)}"

    def save(self, step: int, state: Any, data: Any) -> None:
        """Starts writing a checkpoint, after that of the save before is complete.

        Raises:
          OSError: This one or the one before could not be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
        )
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # Orbax and TensorStore raise many types
            raise self._failure(error) from error

    def finish(self) -> None:
        """Waits until all is written; raises OSError where it could not be."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def restore(self, like: Any) -> tuple[Any, Any]:
        """State and data of the latest checkpoint.

        Args:
          like: The state's tree, with shapes, dtypes and shardings.

        Raises:
          ValueError: The checkpoint is damaged, or of another model or optimizer.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(self.latest, args=items)
        except Exception as error:
            where = self.directory / str(self.latest)
            raise ValueError(f"{where}: cannot be read: {_short(error)}") from error
        return found["state"], found["data"]

    def preempted(self, step: int) -> bool:
        """Whether the hosts agree that they are told to stop, at this step."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Ends the background work. Errors of writing came from `finish`, or are lost.

        They must not take the place of what ended the run.
        """
        with contextlib.suppress(Exception):
            self._manager.close()

    def _failure(self, error: Exception) -> OSError:
        # Of the other arrays of this save, each with a traceback, after the end's line.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        return OSError(
            f"{self.directory}: a checkpoint cannot be written: {_short(error)}"
        )


def check_space(directory: Path, state: Any, keep: int) -> None:
    """Raises OSError where the disk cannot hold the checkpoints of a run.

    That is `keep` of them, one more that is being written, and the exported model.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    needed = (keep + 1) * size + MARGIN
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{directory}: {keep} checkpoints and one on the way need "
            f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: lower keep"
        )


def _short(error: Exception) -> str:
    """An error of Orbax in a line; it may have thousands of characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
