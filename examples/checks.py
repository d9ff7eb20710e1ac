"""Checks of arguments that several commands share."""

import os
from collections.abc import Iterable
from pathlib import Path

SEEDS = 1 << 32  # jax.random.key drops higher bits


def check_name(argument: str, name: str, allowed: Iterable[str]) -> None:
    """Raises ValueError unless `name` is allowed."""
    if name not in allowed:
        raise ValueError(f"{argument} must be among {', '.join(allowed)}; got {name!r}")


def check_least(argument: str, value: float | None, least: int) -> None:
    """Raises ValueError unless `value` is `least` or above, or None."""
    if value is not None and value < least:
        raise ValueError(f"{argument} must be {least} or above, got {value}")


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that is not of 32 bits."""
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed must be 0 to {SEEDS - 1}, got {seed}")


def check_writable(output: Path, directory: Path) -> None:
    """Raises ValueError, which names `output`, unless files can be made in `directory`.

    Where that does not exist yet, its nearest parent that does must be writable.
    """
    directory = directory.absolute()
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{output}: cannot write to {existing}")
