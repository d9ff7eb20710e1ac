"""Entries that cannot move any more, because their second moment is infinite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


class StuckEntries:
    """Looks for entries that cannot move any more, and says so once.

    A finite gradient above 1.8e19 has an infinite square in float32. Adam's second
    moment of the entry is infinite from then on, and each of its updates is 0. No loss
    shows that.

    Args:
      say: Gets the message.
    """

    def __init__(self, say: Callable[[str], None]):
        self.count = 0  # when the state was looked at last
        self._say, self._said = say, False

    def look(self, step: int, opt_state: Any) -> dict[str, float]:
        """Reads all second moments, which are the fields `nu` of an Optax state.

        All processes of a run have to take part.

        Returns:
          "stuck_entries", their number, where there are any; else nothing.
        """
        found = optax.tree.get_all_with_path(opt_state, "nu")
        moments = jax.tree.leaves([tree for _, tree in found])
        self.count = sum(map(int, jax.device_get([_infinite(x) for x in moments])))
        if not self.count:
            return {}
        if not self._said:
            self._said = True
            total = sum(x.size for x in moments)
            self._say(
                f"step {step}: {self.count:,} of {total:,} entries cannot move any "
                "more: a gradient above 1.8e19 made their second moment infinite. To "
                "prevent that, start again with --clip-norm"
            )
        return {"stuck_entries": self.count}


@jax.jit
def _infinite(x: jax.Array) -> jax.Array:
    """How many entries are infinite."""
    return jnp.sum(jnp.isinf(x))
