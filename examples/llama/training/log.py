"""The record of a run: metrics.jsonl and TensorBoard's events."""

import json
import math
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from examples.files import write_json_lines


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; a process killed may leave half of one.

    Raises:
      ValueError: A line is damaged; the message has the file and the line.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict) or not isinstance(value.get("step"), int):
                raise ValueError("not a step's values")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {error}; expected a JSON object with a step. "
                "A run resumes without the lines that you remove"
            ) from None
        found.append(value)
    return found


class MetricsLog:
    """Appends to metrics.jsonl and to the events for TensorBoard.

    Args:
      output: The run's directory.
      step: Of the checkpoint from which the run resumes, or None: what was written of
        later steps is taken back.
      enabled: False in all processes but one.
    """

    def __init__(self, output: Path, step: int | None, enabled: bool):
        self._file: TextIO | None = None
        self._board: Any = None
        if not enabled:
            return
        path = output / "metrics.jsonl"
        kept = read_metrics(path) if step is not None else []
        kept = [line for line in kept if line["step"] <= step]
        write_json_lines(path, kept)
        self._file = path.open("a")
        self._board = _Events(
            output / "tensorboard", None if step is None else step + 1
        )

    def write(self, step: int, values: dict[str, float], group: str) -> None:
        """Writes a line of metrics.jsonl, and scalars named group/value."""
        if self._file is None:
            return
        odd = {name for name, x in values.items() if not math.isfinite(x)}
        line = values | dict.fromkeys(odd)  # JSON has null for them
        try:
            print(json.dumps({"step": step} | line), file=self._file, flush=True)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None
        found = {f"{group}/{name}": values[name] for name in values.keys() - odd}
        self._board.write(step, found, flush=group == "eval")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


class _Events:
    """TensorBoard's events, written at once, so that no thread of a writer can hang.

    They are a convenience: where the disk takes no more, there is one warning, and the
    run continues without them.
    """

    def __init__(self, directory: Path, purge_step: int | None):
        self._writer: EventsWriter | None = None
        try:
            directory.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(directory / "events"))
            if purge_step is not None:  # what there is of later steps does not count
                start = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(step=purge_step, session_log=start))
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, values: dict[str, float], *, flush: bool) -> None:
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                event = Event(step=step, wall_time=time.time())
                event.summary.CopyFrom(scalar(name, value))
                self._writer.write_event(event)
            if flush:
                self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        warnings.warn(f"no more events for TensorBoard: {error}", stacklevel=2)
