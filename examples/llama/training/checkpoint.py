"""Checkpoints of a run, from which it resumes as if nothing had happened."""

import contextlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from examples.llama.training.checksums import checksums

MARGIN = 1 << 26  # bytes, for metrics and the report
ASIDE = "checkpoints_aside"  # where those go that a run did not resume from


class Checkpoint(NamedTuple):
    """What was restored."""

    step: int
    state: Any  # a tree of arrays
    data: Any  # as JSON has it


class Checkpoints:
    """The checkpoints under a directory, written in the background by Orbax.

    Each holds `state`, a tree of arrays with their checksums, and `data`, what else the
    run has to know. One is complete or not there: it is written under another name
    first.
    """

    def __init__(self, directory: Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,  # of processes killed on the way
            enable_async_checkpointing=True,
            # Or threads wait for a directory that could not be made, and keep the
            # process from its end for minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
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
        record = {"run": data, "checksums": checksums(state)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(record)
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

    def restore(
        self,
        like: Any,
        *,
        step: int | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> Checkpoint | None:
        """The newest checkpoint that is not damaged; None where there is none at all.

        Those of later steps move to a directory beside this one, so that the run can
        write its own. In several processes, which might not agree on what is damaged,
        the newest has to be good.

        Args:
          like: The state's tree, with shapes, dtypes and shardings.
          step: Which one to take, in place of the newest.
          warn: Is told of each checkpoint that is passed over.

        Raises:
          ValueError: There is no checkpoint of that step; or it, or each of all, is
            damaged, or of another model or optimizer.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            there = ", ".join(map(str, reversed(steps))) or "none"
            raise ValueError(
                f"resume_from must be a step of a checkpoint in {self.directory}, "
                f"{there}; got {step}"
            )
        failures = []
        for candidate in steps if step is None else [step]:
            try:
                found = self._read(candidate, like)
            except ValueError as error:
                if jax.process_count() > 1:
                    raise ValueError(f"{error}; see --resume-from") from error
                failures.append(error)
                continue
            for failure in failures:
                warn(f"{failure}; resuming from an earlier checkpoint")
            self._set_aside([later for later in steps if later > candidate])
            return found
        if failures:
            raise failures[0]
        return None

    def _read(self, step: int, like: Any) -> Checkpoint:
        where = self.directory / str(step)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(step, args=items)
        except Exception as error:
            raise ValueError(f"{where}: cannot be read: {_short(error)}") from error
        state, record = found["state"], found["data"]
        if not isinstance(record, dict) or record.keys() != {"run", "checksums"}:
            raise ValueError(f"{where}: of another version of the trainer")
        for name, value in checksums(state).items():
            if record["checksums"].get(name) != value:
                raise ValueError(f"{where}: damaged: {name} is not what was saved")
        return Checkpoint(step, state, record["run"])

    def _set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints out of the way. All processes take part."""
        if not steps:
            return
        aside = self.directory.with_name(ASIDE)
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            for step in steps:
                shutil.rmtree(aside / str(step), ignore_errors=True)
                (self.directory / str(step)).rename(aside / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints set aside")
        self._manager.reload()

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
