"""Losses over a large vocabulary, without the logits of a whole batch in memory.

Shapes: B batch, T positions, C positions of a chunk, D hidden size, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp

from examples.llama.model.llama import Llama
from examples.llama.model.products import float32_einsum
from mofo_jax.continual import fisher_probe, forward_kl

Batch = dict[str, jax.Array]  # see text.batches.training_batches; without "row"

CHUNK_BYTES = 1 << 27  # of float32 logits at a time, on all devices together
CHUNKS = 4  # at least; more could leave out more, but each adds up the head's gradient


def next_token_loss(
    model: Llama,
    batch: Batch,
    *,
    packed: bool = False,
    pretrained: Llama | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses that a batch counts, and how many they are, as float32.

    With `packed`, a row holds several texts as segments, and attention stays within a
    segment. Otherwise it holds one text, padded at the right.

    With `pretrained`, the batch's "kl_weight" (float32 [B, L], if there is one) is how
    much of the divergence from that model's predictions is added where a token is
    predicted. A token outside of the loss mask that has one counts as well.
    """
    hidden, targets, mask = predict(model, batch, packed)
    total = cross_entropy_sum(hidden, model.head(), targets, mask)
    if pretrained is None or "kl_weight" not in batch:
        return total, jnp.sum(mask, dtype=jnp.float32)
    other, _, _ = jax.lax.stop_gradient(predict(pretrained, batch, packed))
    weight = _of_next(batch["kl_weight"])
    total += kl_sum(hidden, model.head(), other, pretrained.head(), weight)
    return total, jnp.sum(mask | (weight > 0), dtype=jnp.float32)


def predict(
    model: Llama, batch: Batch, packed: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The states at each position, the tokens that follow them, and which count.

    All L positions are computed, the last one for nothing, because kernels are made
    for lengths such as 1024, not 1023.
    """
    hidden = model.hidden(
        batch["tokens"],
        positions=batch["positions"],
        # Without it, attention is plainly causal, which is faster and all that padding
        # at the right needs.
        segment_ids=batch["segment_ids"] if packed else None,
    )
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    return hidden, targets, _of_next(batch["loss_mask"])


def _of_next(x: jax.Array) -> jax.Array:
    """At each position what x [B, L] has at the next one; the last has none."""
    return jnp.roll(x, -1, axis=1).at[:, -1].set(jnp.zeros([], x.dtype))


def cross_entropy_sum(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> jax.Array:
    """The sum of ``-log softmax(hidden @ head)[targets]`` where `mask` is True.

    Logits exist for a chunk of positions at a time, in float32, and for positions that
    do not count hardly any do. Where a gradient is taken, the forward pass forms it
    too, chunk by chunk, so nothing is computed twice.

    Args:
      hidden: [B, T, D] in the compute dtype, which the products have too.
      head: [D, V] in the parameters' dtype.
      targets: int32 [B, T], each in [0, V).
      mask: bool [B, T].
      chunk_bytes: About the most bytes that a chunk's logits may take.

    Returns:
      A float32 scalar, differentiable in `hidden` and `head`.
    """
    return _cross_entropy_sum(hidden, head, targets, mask, chunk_bytes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy_sum(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    chunk_bytes: int,
) -> jax.Array:
    kernel = head.astype(hidden.dtype)
    _, needed, chunks = _counted_first(hidden, targets, mask, head, chunk_bytes)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        x, targets, mask = (a[i] for a in chunks)
        logits = _logits(x, kernel)
        losses = jax.nn.logsumexp(logits, axis=-1) - pick(logits, targets)
        return total + jnp.sum(losses, where=mask)

    return jax.lax.fori_loop(0, needed, add, jnp.float32(0))


def _forward(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    chunk_bytes: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    kernel = head.astype(hidden.dtype)
    order, needed, chunks = _counted_first(hidden, targets, mask, head, chunk_bytes)

    def add(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, head_gradient, gradients = carry
        x, targets, mask = (a[i] for a in chunks)
        logits = _logits(x, kernel)
        log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        losses = log_sum[..., 0] - pick(logits, targets)
        hit = _hit(logits, targets).astype(jnp.float32)
        gradient = jnp.where(mask[..., None], jnp.exp(logits - log_sum) - hit, 0.0)
        gradient = gradient.astype(x.dtype)
        # Tokens in one axis, for which products are fastest; see Llama.
        rows, gradient = (y.reshape(-1, y.shape[-1]) for y in (x, gradient))
        own = float32_einsum("nd,nv->dv", rows, gradient)
        gradients = gradients.at[i].set((gradient @ kernel.T).reshape(x.shape))
        return total + jnp.sum(losses, where=mask), head_gradient + own, gradients

    zeros = jnp.zeros(head.shape, jnp.float32), jnp.zeros_like(chunks[0])
    start = (jnp.float32(0), *zeros)
    total, head_gradient, gradients = jax.lax.fori_loop(0, needed, add, start)
    batch, time, width = hidden.shape
    gradients = jnp.moveaxis(gradients, 0, 1).reshape(batch, -1, width)[:, :time]
    gradients = _take(gradients, jnp.argsort(order, axis=1))
    return total, (gradients, head_gradient.astype(head.dtype))


def _backward(
    _: int, gradients: tuple[jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    of_hidden, of_head = (scale.astype(g.dtype) * g for g in gradients)
    return of_hidden, of_head, None, None


_cross_entropy_sum.defvjp(_forward, _backward)


def kl_sum(
    hidden: jax.Array,
    head: jax.Array,
    reference_hidden: jax.Array,
    reference_head: jax.Array,
    weights: jax.Array,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> jax.Array:
    """The weighted sum over positions of KL(reference || model), in nats.

    See `forward_kl`. Arguments of the model and of the reference are those of
    `cross_entropy_sum`; weights are [B, T], a mask too.
    """
    kernels = head.astype(hidden.dtype), reference_head.astype(reference_hidden.dtype)

    def add(
        total: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        x, reference_x, weights = chunk
        logits = _logits(x, kernels[0]), _logits(reference_x, kernels[1])
        return total + jnp.sum(forward_kl(*logits) * weights), None

    # A gradient computes each chunk's logits again instead of keeping them.
    weights = weights.astype(jnp.float32)
    chunks = _chunks(chunk_bytes, head.shape[1], hidden, reference_hidden, weights)
    return jax.lax.scan(jax.checkpoint(add), jnp.float32(0), chunks)[0]


def log_probabilities(
    hidden: jax.Array,
    head: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """How likely tokens are where they are predicted. Other places have no logits.

    Args:
      hidden: [B, T, D] in the compute dtype.
      head: [D, V] in the parameters' dtype.
      places: int32 [B, P], positions in each row of hidden; they may repeat.
      targets: int32 [B, P], the tokens that are predicted there.
      chunk_bytes: About the most bytes that a chunk's logits may take.

    Returns:
      float32 [B, P], the targets' log-probabilities; and bool [B, P], whether each is
      the likeliest token.
    """
    kernel = head.astype(hidden.dtype)
    x = _take(hidden, places)

    def score(chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, targets = chunk
        logits = _logits(x, kernel)
        logs = pick(logits, targets) - jax.nn.logsumexp(logits, axis=-1)
        return logs, jnp.argmax(logits, axis=-1) == targets

    def joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(len(x[0]), -1)[:, : targets.shape[1]]

    scored = jax.lax.map(score, _chunks(chunk_bytes, head.shape[1], x, targets))
    logs, first = map(joined, scored)
    return logs, first


def probe_sum(
    hidden: jax.Array,
    head: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> jax.Array:
    """The sum of `fisher_probe` over the positions where `mask` is True.

    Its squared gradient estimates the Fisher information. Arguments are those of
    `cross_entropy_sum`, and a key from `jax.random.key`.
    """
    kernel = head.astype(hidden.dtype)
    chunks = _chunks(chunk_bytes, head.shape[1], hidden, mask)
    keys = jax.random.split(key, len(chunks[0]))

    def add(
        total: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        x, mask, key = chunk
        return total + fisher_probe(_logits(x, kernel), key, mask), None

    return jax.lax.scan(jax.checkpoint(add), jnp.float32(0), (*chunks, keys))[0]


def _logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    logits = float32_einsum("nd,dv->nv", x.reshape(-1, x.shape[-1]), kernel)
    return logits.reshape(*x.shape[:-1], -1)


def pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The logits [...] of targets [...], of logits [..., V]."""
    # A sum, which XLA fuses and splits over a mesh, where a gather would do neither.
    return jnp.sum(logits, axis=-1, where=_hit(logits, targets))


def _hit(logits: jax.Array, targets: jax.Array) -> jax.Array:
    axes = tuple(range(targets.ndim))
    vocabulary = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    return targets[..., None] == jnp.expand_dims(vocabulary, axes)


def _counted_first(
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    head: jax.Array,
    chunk_bytes: int,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Chunks in which each row's counted positions come first, and how many have any.

    Prompts and padding then need no logits: the loops end where no row has more.
    """
    order = jnp.argsort(~mask, axis=1, stable=True)
    arrays = [_take(x, order) for x in (hidden, targets, mask)]
    chunks = _chunks(chunk_bytes, head.shape[1], *arrays, least=CHUNKS)
    longest = jnp.max(jnp.sum(mask, axis=1, dtype=jnp.int32))
    return order, -(-longest // chunks[0].shape[2]), chunks


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, order[..., None] if x.ndim > 2 else order, axis=1)


def chunk_count(batch: int, time: int, vocabulary: int) -> int:
    """How many chunks `cross_entropy_sum` takes where all of [B, T] count."""
    return _cuts(batch, time, vocabulary, CHUNK_BYTES, CHUNKS)[0]


def _cuts(
    batch: int, time: int, vocabulary: int, chunk_bytes: int, least: int
) -> tuple[int, int]:
    """The number of chunks, and their positions."""
    needed = math.ceil(4 * batch * time * vocabulary / chunk_bytes)
    size = math.ceil(time / min(time, max(needed, least)))
    return math.ceil(time / size), size


def _chunks(
    chunk_bytes: int, vocabulary: int, *arrays: jax.Array, least: int = 1
) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ...] cut along T and padded with zeros to [chunks, B, C, ...]."""
    batch, time = arrays[0].shape[:2]
    count, size = _cuts(batch, time, vocabulary, chunk_bytes, least)

    def cut(x: jax.Array) -> jax.Array:
        padding = ((0, 0), (0, count * size - time)) + ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(batch, count, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    return tuple(cut(x) for x in arrays)
