"""Jobs one after another, or several at a time in processes of their own."""

import collections
import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def each(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    workers: int = 1,
    deadline: float = float("inf"),
) -> Iterator[Any]:
    """The results of jobs, as they end.

    Args:
      function: Of a module, as other processes import it.
      jobs: Its arguments.
      workers: Jobs at a time. One is done in this process, several in new ones, each
        of which has its share of this one's cores to itself.
      deadline: Of `time.monotonic`, after which no job begins.
    """
    if workers == 1:
        for job in jobs:
            if time.monotonic() < deadline:
                yield function(job)
        return
    # A fork of a process in which JAX has started threads would hang.
    context = multiprocessing.get_context("spawn")
    shares = context.SimpleQueue()
    for i in range(workers):
        shares.put(_cores()[i::workers])
    waiting = collections.deque(jobs)
    running: set[concurrent.futures.Future[Any]] = set()
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (shares,))
    with pool:
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < deadline:
                running.add(pool.submit(function, waiting.popleft()))
            if not running:
                return
            done, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            yield from (future.result() for future in done)


def _cores() -> list[int]:
    # Elsewhere than on Linux all processes share all cores.
    return sorted(getattr(os, "sched_getaffinity", lambda _: ())(0))


def _start(shares: Any) -> None:
    """In a new process, before JAX counts the cores."""
    if cores := shares.get():
        os.sched_setaffinity(0, cores)

    def end_with_parent() -> None:
        # Which may be killed, and then tells nobody.
        parent = multiprocessing.parent_process()
        assert parent is not None, "a pool started this process"
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
