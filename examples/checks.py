"""Checks of arguments that several commands share."""

from collections.abc import Iterable

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
