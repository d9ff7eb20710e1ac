"""Hooks for tests and benchmarks.

Context managers change how a mask is searched for, never the mask. They hold for
programs that are traced inside them and are part of the key of JAX's caches: nothing
compiled inside is used outside, or the other way round.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from mofo_jax._selection.counting import sum_exactly
from mofo_jax._selection.options import options

__all__ = ["add_counts", "count_passes", "integer_limit", "search_program"]

Program = Literal["any device", "one CPU device", "one GPU", "TPUs"]


def search_program(name: Program) -> contextlib.AbstractContextManager[Any]:
    """Chooses the program that searches for thresholds.

    Without it, the one for a single CPU device or GPU runs where the process, or the
    mesh that is set, has that and no other device.

    Args:
      name: ``"any device"``, ``"one CPU device"``, ``"one GPU"`` or ``"TPUs"``. All of
        them run on any device, but the second and the third may move arrays between
        several.

    Returns:
      A context manager.

    Raises:
      ValueError: An unknown name.

    >>> import jax.numpy as jnp
    >>> from mofo_jax import testing, top_fraction_mask
    >>> with testing.search_program("any device"):
    ...     top_fraction_mask(jnp.array([1.0, -3.0, 2.0]), 0.4)
    Array([False,  True, False], dtype=bool)
    """
    if name not in get_args(Program):
        allowed = " or ".join(f'"{program}"' for program in get_args(Program))
        raise ValueError(f"name must be {allowed}, got {name!r}")
    return _with(program=name)


def integer_limit(limit: int) -> contextlib.AbstractContextManager[Any]:
    """Lowers the limit from which on counts and indices take more than one integer.

    Arrays of a few entries then go the way of those with more than 2^31.

    Args:
      limit: From 2 to 2^31, which is the limit without this.

    Returns:
      A context manager.

    Raises:
      ValueError: The limit is out of range.

    >>> import jax.numpy as jnp
    >>> from mofo_jax import testing, top_fraction_mask
    >>> with testing.integer_limit(2):
    ...     top_fraction_mask(jnp.array([1.0, -3.0, 2.0]), 0.4)
    Array([False,  True, False], dtype=bool)
    """
    if not 2 <= limit <= 2**31:
        raise ValueError(f"limit must be from 2 to 2^31, got {limit!r}")
    return _with(integer_limit=limit)


@contextlib.contextmanager
def count_passes() -> Iterator[Callable[[], int]]:
    """Counts the passes over the arrays that searches take.

    Returns:
      A context manager. It yields a function that waits for the programs that run, and
      returns how many passes have ended since it was last called.

    >>> import jax.numpy as jnp
    >>> from mofo_jax import testing, top_fraction_mask
    >>> with testing.count_passes() as passes:
    ...     mask = top_fraction_mask(jnp.array([1.0, -3.0, 2.0]), 0.4)
    ...     passes() > 0, passes()
    (True, 0)
    """
    ended: list[None] = []

    def taken() -> int:
        jax.effects_barrier()
        number = len(ended)
        ended.clear()
        return number

    with _with(on_pass=lambda _: ended.append(None)):
        yield taken


def add_counts(counts: jax.typing.ArrayLike) -> int:
    """Adds up counts as the search adds those of an array beyond 2^32 entries.

    Args:
      counts: uint32 ``[parts]``.

    Returns:
      The exact sum.

    >>> from mofo_jax import testing
    >>> import numpy as np
    >>> testing.add_counts(np.array([2**32 - 1, 2], np.uint32)) == 2**32 + 1
    True
    """
    counts = jnp.asarray(counts)[:, None]
    total = sum_exactly(counts, (0, 1), (counts.size, 2**32 - 1))
    high, low = (int(limb[0, 0]) for limb in total.limbs)
    return (high << 32) + low


def _with(**changes: Any) -> contextlib.AbstractContextManager[Any]:
    chosen: contextlib.AbstractContextManager[Any]
    chosen = options(options.value._replace(**changes))
    return chosen
