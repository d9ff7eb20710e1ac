"""metrics.jsonl and TensorBoard's events, on a good disk and on a full one."""

import json
import re
import subprocess
import sys
import warnings

import pytest

from examples.llama.training.log import MetricsLog, read_metrics
from tests import processes

# Events are longer than lines of metrics, so that the limit stops them first.
FULL = """
import resource, sys
from pathlib import Path
from examples.llama.training.log import MetricsLog
log = MetricsLog(Path(sys.argv[1]), None, True)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # a disk that is full
for step in range(1, 121):
    log.write(step, {"loss": step / 8}, "eval")
log.close()
"""


def test_events_do_without_a_full_disk(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", FULL, str(tmp_path)],
        env=processes.environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("no more events for TensorBoard: [Errno 27]") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 120


def test_events_do_without_a_directory(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.warns(UserWarning, match="no more events for TensorBoard"):
        log = MetricsLog(tmp_path, None, True)
    with warnings.catch_warnings(action="error"):
        log.write(1, {"loss": 2.0}, "train")
        log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "[2]", '{"loss": 1.0}', "\udcff"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    text = json.dumps({"step": 1}) + f"\n{line}\n"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ")):
        read_metrics(path)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ")):
        MetricsLog(tmp_path, 1, True)


def test_half_a_line_at_the_end_is_of_a_killed_process(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    assert read_metrics(path) == [{"step": 1}]
