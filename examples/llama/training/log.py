"""The record of a run: metrics.jsonl and TensorBoard's events."""

import json
import math
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from examples.files import write_json_lines


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; a process killed may leave half of one."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


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
        purge = None if step is None else step + 1
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=purge)

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
        for name in values.keys() - odd:
            self._board.add_scalar(f"{group}/{name}", values[name], step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()
