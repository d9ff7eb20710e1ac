"""Programs that are compiled once for many runs."""

import contextlib
import os
from collections.abc import Iterator

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
