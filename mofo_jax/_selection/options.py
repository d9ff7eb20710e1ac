"""What tests and benchmarks may choose, by way of :mod:`mofo_jax.testing`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Options(NamedTuple):
    """Read while a program is traced.

    Attributes:
      program: Name of the search program; None for the one that suits the devices.
      integer_limit: Integers from here on take a second limb.
      on_pass: Called in every pass of a search, as the compiled program runs.
    """

    program: str | None = None
    integer_limit: int = 2**31
    on_pass: Callable[[jax.Array], None] | None = None


# Part of the key of JAX's caches: what was compiled for other options is not used.
options: Any = jax.make_user_context(Options())
