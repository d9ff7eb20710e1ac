"""One process that trains again and again, with one system call failing each time.

python -m tests.faults.injected DIRECTORY FIRST STEP, under LD_PRELOAD=inject.so; see
`__main__`. Writes a line of JSON for each training.
"""

import contextlib
import ctypes
import errno
import faulthandler
import json
import os
import shutil
import sys
import threading
import warnings
from pathlib import Path

from examples.llama.training.loop import train
from tests.examples.llama.runs import config_of, tensors_of, write_files

CODES = (errno.ENOSPC, errno.EIO, errno.EINTR)
SECONDS = 60  # after which a training counts as one that hangs
# Evaluations, an export, a report, and enough checkpoints that the first is removed.
CHANGES = {
    "steps": 6,
    "eval_every": 3,
    "save_every": 2,
    "keep": 2,
    "samples": 1,
    "report": True,
}


def results_of(output: Path) -> dict[str, object]:
    """What has to be the same after any fault."""
    found = json.loads((output / "result.json").read_text())
    return {
        "tensors": tensors_of(output / "model"),
        "before": found["before"],
        "after": found["after"],
    }


def attempt(config) -> tuple[str, str]:
    """How a training ended: "finished", "refused", or as it must not."""
    before = set(threading.enumerate())
    outcome, message = "finished", ""
    try:
        train(config, progress=False)
    except (OSError, ValueError) as error:
        outcome, message = "refused", " ".join(str(error).split())
    except BaseException as error:
        outcome, message = "crashed", f"{type(error).__name__}: {error}"
    # Orbax may still be writing other arrays. The end of a process waits for it.
    for thread in set(threading.enumerate()) - before:
        with contextlib.suppress(TimeoutError):
            thread.join(SECONDS / 6)
        if thread.is_alive() and not thread.daemon:
            return "does not end", f"{thread.name} after {outcome} {message}"
    return outcome, message


def main(directory: Path, first: int, step: int) -> None:
    warnings.simplefilter("ignore")
    library = ctypes.CDLL(None)
    library.fault_arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int)
    library.fault_calls.restype = ctypes.c_long
    library.fault_last.restype = ctypes.c_char_p
    files_at = directory / f"files{os.getpid()}"
    files_at.mkdir(parents=True)
    files = write_files(files_at)
    undisturbed = directory / f"undisturbed{os.getpid()}"
    library.fault_arm(bytes(undisturbed), 0, 0)
    train(config_of(files, undisturbed, **CHANGES), progress=False)
    expected, calls = results_of(undisturbed), library.fault_calls()
    for number in range(first, calls + 1, step):
        output = directory / f"run{number}"
        config = config_of(files, output, **CHANGES)
        code = CODES[number // step % len(CODES)]
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        print(json.dumps({"number": number, "of": calls, "begun": True}), flush=True)
        library.fault_arm(bytes(output), number, code)
        outcome, message = attempt(config)
        call = library.fault_last().decode()
        library.fault_arm(b"", 0, 0)
        again = ""
        if outcome != "finished":
            again, why = attempt(config)
            message += f" | {why}" if why else ""
        same = (output / "result.json").exists() and results_of(output) == expected
        faulthandler.cancel_dump_traceback_later()
        line = {
            "number": number,
            "call": call,
            "errno": errno.errorcode[code],
            "outcome": outcome,
            "again": again,
            "same": same,
            "message": message,
        }
        print(json.dumps(line), flush=True)
        shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
