"""Programs that are compiled once for many runs, and the time that compiling takes."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def kept_in(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Takes compiled programs from a directory, also those of other processes."""
    options = {
        "jax_compilation_cache_dir": os.fspath(directory),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # or an earlier directory stays in use
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


class Stopwatch:
    """Seconds spent in its `with` blocks, without what JAX traced and compiled there.

    Wait in the block for what is computed.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._compiling: list[tuple[float, float]] = []
        jax.monitoring.register_event_time_span_listener(self._note)
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        elapsed = time.perf_counter() - self._begun
        jax.monitoring.unregister_event_time_span_listener(self._note)
        self.seconds += max(0.0, elapsed - covered(self._compiling))

    def _note(
        self, event: str, start_time: float, end_time: float, **_: object
    ) -> None:
        if event.startswith("/jax/core/compile/"):
            self._compiling.append((start_time, end_time))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length that spans cover together, some of which lie in others."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
