"""Llama in Flax NNX: Llama 2, TinyLlama, Llama 3 and its 3.1 and 3.2.

Configuration fields and parameter paths have Hugging Face's names, and rotary
embeddings its half-split convention: its checkpoints differ by transposes alone.

Shapes: B batch, T tokens of this call, S cache slots, N query heads, K key/value
heads, D head dimension, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.attention import attend, takes_segments
from examples.llama.model.products import float32_einsum
from examples.llama.model.sharding import constrain

# What a layer keeps of its forward pass for the backward pass; the rest is computed
# again. From most memory to least.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, in S slots per sequence."""

    layers: list[tuple[jax.Array, jax.Array]]  # keys and values, each [B, S, K, D]
    mask: jax.Array  # bool [B, S], True where a slot holds a real token
    length: jax.Array  # int32 [], the number of slots written


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each pair of head dimensions, float32 [D // 2]."""
    exponent = np.arange(0, config.head_size, 2) / config.head_size
    frequencies = config.rope_theta**-exponent
    if (scaling := config.rope_scaling) is not None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, heads, D] by angles [B, T, 1, D // 2] in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    halves = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(halves, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention in which groups of query heads share a key/value head."""

    def __init__(self, config: LlamaConfig, linear: Any):
        width, head_dim = config.hidden_size, config.head_size
        self.head_dim = head_dim
        self.q_proj = linear(width, config.num_attention_heads * head_dim)
        self.k_proj = linear(width, config.num_key_value_heads * head_dim)
        self.v_proj = linear(width, config.num_key_value_heads * head_dim)
        self.o_proj = linear(config.num_attention_heads * head_dim, width)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        mask: jax.Array | None,
        segment_ids: jax.Array | None,
        past: tuple[jax.Array, jax.Array] | None,
        start: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        heads = (*cos.shape[:2], -1, self.head_dim)
        q = _rotate(self.q_proj(x).reshape(heads), cos, sin)
        k = _rotate(self.k_proj(x).reshape(heads), cos, sin)
        v = self.v_proj(x).reshape(heads)
        if past is not None:
            k = jax.lax.dynamic_update_slice_in_dim(past[0], k, start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(past[1], v, start, axis=1)
        y = attend(q, k, v, mask, segment_ids)
        return self.o_proj(y.reshape(x.shape[0], -1)), (k, v)


class MLP(nnx.Module):
    """The gated feed-forward layer, SwiGLU."""

    def __init__(self, config: LlamaConfig, linear: Any):
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention, then the feed-forward layer, each normed before and added to x."""

    def __init__(self, config: LlamaConfig, linear: Any, norm: Any):
        self.input_layernorm = norm(config.hidden_size)
        self.self_attn = Attention(config, linear)
        self.post_attention_layernorm = norm(config.hidden_size)
        self.mlp = MLP(config, linear)

    def __call__(
        self, x: jax.Array, *attention_args: Any
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        y, keys_values = self.self_attn(self.input_layernorm(x), *attention_args)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values


class Llama(nnx.Module):
    """A Llama that maps tokens to the logits of the tokens that follow them.

    Args:
      config: The model's shape.
      rngs: Source of the initial weights, normal(0.02) as Hugging Face has them.
      dtype: Of the activations, and of weights as they enter a product. Norms,
        rotary angles, softmax and logits are float32 whatever it is.
      param_dtype: Of the parameters as they are stored and trained.
      remat: What a layer keeps for the backward pass: "none", everything; "dots", the
        results of products with weights; "full", its input alone.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "none",
    ):
        if remat not in REMAT_POLICIES:
            allowed = ", ".join(REMAT_POLICIES)
            raise ValueError(f"remat must be one of {allowed}, got {remat!r}")
        self.config, self.dtype, self.remat = config, dtype, remat
        init = nnx.initializers.normal(0.02)
        linear = functools.partial(
            nnx.Linear,
            use_bias=False,
            kernel_init=init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        norm = functools.partial(
            nnx.RMSNorm,
            epsilon=config.rms_norm_eps,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        vocabulary, width = config.vocab_size, config.hidden_size
        self.embed_tokens = nnx.Embed(
            vocabulary,
            width,
            embedding_init=init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.layers = nnx.List(
            DecoderLayer(config, linear, norm) for _ in range(config.num_hidden_layers)
        )
        self.norm = norm(width)
        if not config.tie_word_embeddings:
            self.lm_head = linear(width, vocabulary)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Logits of the next token, and the cache where one was given.

        Args:
          tokens: int32 [B, T], each in [0, V).
          positions: int32 [B, T] for the rotary embeddings; by default the tokens'
            indices, counted from the cache's length where there is one.
          mask: bool [B, T], True at real tokens and False at padding, which no token
            attends to, neither now nor later through the cache. Default all True.
          segment_ids: int32 [B, T], of texts packed into one row: a token attends to
            tokens of its own segment alone. Not with a cache.
          cache: Of the tokens before these. Must have T slots left: under jit that
            cannot be checked, and a write past the end would land on earlier slots.

        Returns:
          float32 logits [B, T, V], or (logits, the cache with these tokens added).

        Raises:
          ValueError: `positions` is None and the tokens are more than the model's
            max_position_embeddings, the tokens are more than the cache's slots, or
            `segment_ids` come with a cache.
        """
        x, new_cache = self._states(tokens, positions, mask, segment_ids, None, cache)
        # Logits in bfloat16 would be off by several per cent of a probability.
        logits = float32_einsum("btd,dv->btv", x, self.head().astype(self.dtype))
        return logits if cache is None else (logits, new_cache)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        branch_ids: jax.Array | None = None,
    ) -> jax.Array:
        """The normed states [B, T, hidden_size] whose products with `head` are logits.

        With `branch_ids`, int32 [B, T], a text may continue in several ways, and
        what comes before is computed once: a token reads those of its own branch and of
        branch 0. Other arguments and errors are those of a call.
        """
        return self._states(tokens, positions, mask, segment_ids, branch_ids, None)[0]

    def check_length(self, max_length: int) -> None:
        """Raises ValueError where rows of `max_length` exceed the model's positions."""
        limit = self.config.max_position_embeddings
        if max_length > limit:
            raise ValueError(
                f"max_length must be up to the model's {limit}, got {max_length}"
            )

    def head(self) -> jax.Array:
        """The matrix [hidden_size, V] of the output head, in the parameters' dtype."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def _states(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        mask: jax.Array | None,
        segment_ids: jax.Array | None,
        branch_ids: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        batch, time = tokens.shape
        start = jnp.int32(0) if cache is None else cache.length
        index = start + jnp.arange(time, dtype=jnp.int32)
        if positions is None:
            if time > (limit := self.config.max_position_embeddings):
                raise ValueError(
                    f"{time} tokens are more than max_position_embeddings, {limit}"
                )
            positions = jnp.broadcast_to(index, (batch, time))
        if cache is not None:
            if time > (size := cache.mask.shape[1]):
                raise ValueError(f"{time} tokens are more than the {size} cache slots")
            if segment_ids is not None:
                raise ValueError("segment_ids must be None where there is a cache")
            if mask is None:
                mask = jnp.ones((batch, time), bool)
            mask = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, start, axis=1)
        readable = None  # plainly causal, for which there are the fastest kernels
        segments = None
        if mask is None and branch_ids is None and takes_segments(time):
            segments, segment_ids = segment_ids, None
        if any(x is not None for x in (mask, segment_ids, branch_ids)):
            # Causal by slot, not by position: padding may shift positions.
            slots = jnp.arange(time if mask is None else mask.shape[1], dtype=jnp.int32)
            readable = (slots[None, :] <= index[:, None])[None]  # [B, T, S]
            if mask is not None:
                readable &= mask[:, None, :]
            if segment_ids is not None:
                readable &= segment_ids[:, :, None] == segment_ids[:, None, :]
            if branch_ids is not None:
                before, own = branch_ids[:, None, :], branch_ids[:, :, None]
                readable &= (before == own) | (before == 0)
        frequencies = rope_frequencies(self.config)[None, None, :]
        angles = positions[:, :, None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]

        def run(layer: DecoderLayer, x: jax.Array, past: Any) -> Any:
            return layer(x, cos, sin, readable, segments, past, start)

        if self.remat != "none" and cache is None:  # no backward pass with a cache
            run = nnx.remat(run, policy=REMAT_POLICIES[self.remat])
        # Tokens in one axis, [B T, D]: the gradient of products of three axes takes
        # XLA's CPU backend 1.6 times as long.
        x = constrain(self.embed_tokens(tokens.reshape(-1)), "batch", None)
        written: list[tuple[jax.Array, jax.Array]] = []
        for i, layer in enumerate(self.layers):
            x, keys_values = run(layer, x, None if cache is None else cache.layers[i])
            x = constrain(x, "batch", None)
            if cache is not None:
                written.append(keys_values)
        x = self.norm(x).astype(self.dtype).reshape(batch, time, -1)
        if cache is not None:
            assert mask is not None, "the cache has one"
            cache = Cache(written, mask, start + time)
        return x, cache

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache with `length` slots for each of `batch_size` sequences."""
        config = self.config
        shape = (batch_size, length, config.num_key_value_heads, config.head_size)
        # Every array is one of its own, so that the cache can be donated.
        layers = [
            (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
            for _ in range(config.num_hidden_layers)
        ]
        return Cache(layers, jnp.zeros((batch_size, length), bool), jnp.int32(0))
