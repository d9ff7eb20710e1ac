"""The mask by :func:`jax.lax.top_k`, which the search is tested against."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mofo_jax._selection.counting import Integers
from mofo_jax._selection.ranking import Axes, block_count, entry_axes, order_bits


def top_k_mask(x: jax.Array, k: Integers, most: int, block_axes: Axes) -> jax.Array:
    """Marks the k largest of each block, where k is at most a number."""
    # Of the bits, because XLA's top_k takes bfloat16 subnormals for zero on the CPU.
    order = block_axes + entry_axes(x.shape, block_axes)
    shape = tuple(x.shape[a] for a in order)
    n = x.size // block_count(x.shape, block_axes)
    rows = order_bits(x).transpose(order).reshape(-1, n)
    _, columns = lax.top_k(rows, most)
    ranks = jnp.arange(columns.shape[1], dtype=jnp.uint32)
    chosen = jnp.broadcast_to(ranks[None] < k.limbs[-1], columns.shape)
    mask = jnp.zeros(rows.shape, bool)
    mask = mask.at[jnp.arange(rows.shape[0])[:, None], columns].set(chosen)
    return mask.reshape(shape).transpose(tuple(np.argsort(order).tolist()))
