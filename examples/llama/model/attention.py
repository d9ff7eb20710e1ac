"""Attention, by the best kernel that a backend has.

On GPUs that is cuDNN's flash attention, on TPUs JAX's splash attention. Neither keeps
anything of size T x S. What they do not take goes to `jax.nn.dot_product_attention`.
On CPUs that takes twice as long as `_causal`.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, each for G = N / K
of them, D head dimension.
"""

import jax
import jax.numpy as jnp
import numpy as np

from examples.llama.model import splash
from examples.llama.model.platforms import platform
from examples.llama.model.products import float32_einsum

# With four parts of the queries, each of which looks at no later keys, 5/8 of the
# products are left; with more, hardly fewer, and they take longer to compile.
PARTS = 4

_Kept = tuple[jax.Array, ...]  # by `_forward`, for `_backward`


def takes_segments(time: int) -> bool:
    """Whether `attend` takes segment_ids of rows of this length, in place of a mask."""
    return platform() == "tpu" and splash.fits(time)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """What q [B, T, N, D] reads of v [B, S, K, D] by its products with k [B, S, K, D].

    Args:
      q: Queries; the products are divided by the square root of D.
      k: Keys.
      v: Values.
      mask: bool [B, T, S], True where a query may read; or None, where S is T and every
        query reads its own position and those before it.
      segment_ids: int32 [B, T], where `takes_segments` and there is no mask: a query
        reads those of its own segment alone.

    Returns:
      [B, T, N, D] in the dtype of q.
    """
    on = platform()
    if mask is None and on == "cpu":
        return _causal(q, k, v)
    if mask is None and takes_segments(q.shape[1]):
        return splash.splash(q, k, v, segment_ids)
    assert segment_ids is None, "takes_segments says so"
    flash = mask is None and on == "gpu" and q.dtype != jnp.float32
    # It mixes dtypes, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if mask is None else mask[:, None],
            is_causal=mask is None,
            implementation="cudnn" if flash else "xla",
        )


def _causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention, with a key/value head's query heads in one product."""
    batch, time, heads, size = q.shape
    groups = heads // k.shape[2]
    # Here, where the numbers are fewer than the products are.
    q = q * size**-0.5
    q = q.reshape(batch, time, -1, groups, size)
    q = q.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, D]
    k, v = (
        x.transpose(0, 2, 1, 3).reshape(-1, time, size) for x in (k, v)
    )  # [B K, T, D]
    parts, length = [], -(-time // PARTS)
    for start in range(0, time, length):
        end = min(start + length, time)
        part = q[:, :, :, start:end].reshape(len(k), -1, size)
        later = ~np.tri(end - start, end, start, dtype=bool)
        # Added, which takes a pass less than choosing.
        bias = np.tile(np.where(later, -np.float32(np.inf), 0), (groups, 1))[None]
        y = _read(part, k[:, :end], v[:, :end], bias)
        parts.append(y.reshape(batch, -1, groups, end - start, size))
    y = jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, time, heads, size)


@jax.custom_vjp
def _read(q: jax.Array, k: jax.Array, v: jax.Array, bias: np.ndarray) -> jax.Array:
    """Softmax(q k^T + bias) v of each batch entry."""
    return _forward(q, k, v, bias)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: np.ndarray
) -> tuple[jax.Array, _Kept]:
    scores = float32_einsum("bth,bsh->bts", q, k) + bias
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    # Divided after the product, where the numbers are fewer.
    scale = 1 / jnp.sum(weights, axis=-1, keepdims=True)
    y = float32_einsum("bts,bsh->bth", weights.astype(v.dtype), v) * scale
    return y.astype(q.dtype), (q, k, v, weights, scale, y)


def _backward(
    kept: _Kept, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, scale, y = kept
    scaled = gradient.astype(jnp.float32) * scale
    mean = jnp.sum(scaled * y, axis=-1, keepdims=True)
    scaled = scaled.astype(q.dtype)
    of_weights = float32_einsum("bth,bsh->bts", scaled, v)
    of_scores = (weights * (of_weights - mean)).astype(q.dtype)
    of_q = float32_einsum("bts,bsh->bth", of_scores, k)
    # The short axis D first: as [S, D] these products take three times as long, which
    # XLA would make of them but for the barrier.
    of_k = float32_einsum("bth,bts->bhs", q, of_scores)
    of_v = float32_einsum("bth,bts->bhs", scaled, weights.astype(v.dtype))
    of_k, of_v = (
        x.transpose(0, 2, 1) for x in jax.lax.optimization_barrier((of_k, of_v))
    )
    return of_q.astype(q.dtype), of_k.astype(k.dtype), of_v.astype(v.dtype), None


_read.defvjp(_forward, _backward)
