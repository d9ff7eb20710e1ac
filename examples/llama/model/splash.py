"""Attention on TPUs by JAX's splash attention, which keeps nothing of size T x S.

Shapes are those of `attention`.
"""

import functools
import math
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.sharding import PartitionSpec

from examples.llama.model.sharding import MESH_AXES, partition

LANES = 128  # a block is a multiple of these
# Larger blocks read keys less often. As MaxText has them.
BLOCK = 512


def fits(time: int) -> bool:
    """Whether the kernel takes rows of this length."""
    return time % LANES == 0


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments.

    Args:
      q: [B, T, N, D]; the products are divided by the square root of D.
      k: [B, T, K, D].
      v: As k.
      segment_ids: int32 [B, T], or None where a row is one segment.
      interpret: Whether to run on another device, slowly.

    Returns:
      [B, T, N, D] in the dtype of q.
    """
    ids = [] if segment_ids is None else [segment_ids]
    local = functools.partial(_on_one_device, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.axis_names == MESH_AXES:
        # Rows and heads are independent. A kernel is not divided by the compiler.
        specs = [
            _spec(mesh, x.shape, heads) for x, heads in ((q, "heads"), (k, "kv_heads"))
        ]
        if specs[1][2] is None:  # whole key heads have no part of the query heads
            specs[0] = specs[1]
        rows = PartitionSpec(specs[0][0])
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs[0], specs[1], specs[1], *[rows] * len(ids)),
            out_specs=specs[0],
            check_vma=False,
        )
    return local(q, k, v, *ids)


def _spec(mesh: Any, shape: tuple[int, ...], heads: str) -> PartitionSpec:
    return partition(mesh, ("batch", None, heads, None), shape)


def _on_one_device(
    q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array, interpret: bool
) -> jax.Array:
    time, heads, size = q.shape[1:]
    block = math.gcd(time, BLOCK)
    sizes = BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = make_splash_mha(
        MultiHeadMask([CausalMask((time, time))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * size**-0.5, k, v))
    segments = [SegmentIds(x, x) for x in ids]
    return jax.vmap(kernel)(q, k, v, *segments).transpose(0, 2, 1, 3)
