"""Everything that may go wrong around a run, done to real runs of a small model.

python -m tests.faults, or make test-faults. Needs gcc, and Linux. Makes every system
call that writes into a run's output fail once, with a full disk, an input/output error
or an interruption; kills a run at random moments; and lets one of two hosts die.
Whatever happens, the run has to end with the same bits as one that nothing happened to,
at once or when the same command is given again. Prints a table of what was done.
"""

import collections
import concurrent.futures
import contextlib
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from examples import terminal
from tests.examples.llama.runs import (
    config_of,
    finished,
    lines_of,
    start,
    tensors_of,
    wait_for,
    write_files,
)
from tests.examples.llama.training.test_two_processes import pair
from tests.processes import environment

HERE = Path(__file__).parent
KILLS = 20
WORKERS = 4


def inject(directory: Path) -> Iterator[dict]:
    """The outcome of each injected fault."""
    library = directory / "inject.so"
    build = ["gcc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "inject.c", "-ldl"]
    subprocess.run(build, check=True)
    settings = environment() | {
        "LD_PRELOAD": str(library),
        "JAX_COMPILATION_CACHE_DIR": str(directory / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def work(first: int) -> None:
        """Puts the lines of one process, and of those that replace it, in the queue."""
        command = [sys.executable, "-m", "tests.faults.injected", directory / "runs"]
        while True:
            with tempfile.TemporaryFile("w+") as errors:  # a pipe would fill up
                process = subprocess.Popen(
                    [*command, str(first), str(WORKERS)],
                    env=settings,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
                running = None
                for text in process.stdout:
                    line = json.loads(text)
                    running = line["number"] if line.get("begun") else None
                    lines.put(line)
                if process.wait() == 0:
                    return
                errors.seek(0)
                message = errors.read()[-3000:]
            outcome = "hung or died" if running else "ended before any fault"
            lines.put({"number": running, "outcome": outcome, "message": message})
            if running is None:
                return
            first = running + WORKERS

    lines: queue.Queue[dict] = queue.Queue()
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        working = [pool.submit(work, first) for first in range(1, WORKERS + 1)]
        while not (all(x.done() for x in working) and lines.empty()):
            with contextlib.suppress(queue.Empty):
                yield lines.get(timeout=0.2)
    for worker in working:
        worker.result()  # raises what it did


def faults(directory: Path) -> bool:
    """Injects all faults; says which were not survived."""
    counts: collections.Counter = collections.Counter()
    good = True
    with tqdm(desc="faults", **terminal.bar_style()) as bar:
        for line in inject(directory):
            if line.get("begun"):
                bar.total = line["of"]
                continue
            bar.update()
            if line.get("call") == "":
                counts["not reached"] += 1
                continue
            ended = line["outcome"], line.get("again", ""), line.get("same", False)
            counts[line.get("errno", "?"), *ended] += 1
            # A failure after the last file has its name: all is there, and a rerun says
            # so.
            complete = line.get("same") and "it is finished" in line["message"]
            fine = ("finished", "", True), ("refused", "finished", True)
            if ended not in fine and not complete:
                good = False
                tqdm.write(json.dumps(line))
    for key, count in sorted(counts.items(), key=str):
        print(f"{count:5} {key}")
    injected = sum(counts.values()) - counts["not reached"]
    print(f"{injected} faults injected")
    return good and injected >= 200


def kills(directory: Path) -> bool:
    """Kills runs at random moments, from the start of the process to its end."""
    files, cache = write_files(directory), directory / "cache"
    changes = {"steps": 60, "save_every": 2, "eval_every": 20, "report": True}
    for name in ("compiling", "undisturbed"):
        begun = time.monotonic()
        finished(start(config_of(files, directory / name, **changes), cache))
        lasts = time.monotonic() - begun
    expected = tensors_of(directory / "undisturbed" / "model")
    rng, done, good, runs = random.Random(0), 0, True, 0
    while done < KILLS:
        output = directory / f"killed{runs}"
        runs += 1
        while done < KILLS and not (output / "result.json").exists():
            process = start(config_of(files, output, **changes), cache)
            try:
                process.wait(rng.uniform(0.2, 1.0) * lasts)
            except subprocess.TimeoutExpired:
                process.kill()
                done += 1
            process.communicate()
        if not (output / "result.json").exists():
            finished(start(config_of(files, output, **changes), cache))
        good &= tensors_of(output / "model") == expected
    print(f"{done} kills of {runs} runs; all ended with the same bits: {good}")
    return good


def hosts(directory: Path) -> bool:
    """Kills one of two processes of a run, and starts both again."""
    files, cache = write_files(directory), directory / "cache"
    changes = {"steps": 40, "save_every": 2}
    for process in pair(files, directory / "undisturbed", cache, **changes):
        finished(process)
    output = directory / "run"
    both = pair(files, output, cache, **changes)
    wait_for(lambda: lines_of(output) >= 15, *both)
    both[1].kill()
    time.sleep(5)
    both[0].kill()  # as a cluster does, once a host is lost
    for process in both:
        process.communicate()
    for process in pair(files, output, cache, **changes):
        finished(process)
    expected = tensors_of(directory / "undisturbed" / "model")
    good = tensors_of(output / "model") == expected
    print(f"one of two hosts died and came back; the same bits: {good}")
    return good


def main() -> None:
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    good = True
    for part in (faults, kills, hosts):
        with tempfile.TemporaryDirectory() as directory:
            good &= part(Path(directory))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
