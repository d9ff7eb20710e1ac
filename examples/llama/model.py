"""Llama in Flax NNX: Llama 2, TinyLlama, Llama 3 and its 3.1 and 3.2.

Configuration fields and parameter paths have Hugging Face's names, and rotary
embeddings its half-split convention: its checkpoints differ by transposes alone.

Shapes: B batch, T tokens of this call, S cache slots, N query heads, K key/value
heads, D head dimension, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike


def _check_numbers(config: "RopeScaling | LlamaConfig") -> None:
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        if kind in (int, float) and not (isinstance(value, int | kind) and value > 0):
            raise ValueError(
                f"{field.name} must be a positive {kind.__name__}, got {value!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How Llama 3.1 and 3.2 stretch their rotary frequencies to longer contexts.

    Wavelengths longer than ``original_max_position_embeddings / low_freq_factor``
    grow by `factor`, those shorter than ``... / high_freq_factor`` stay, and those
    between are interpolated. Raises ValueError for a value out of range.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = "llama3"

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.rope_type != "llama3":
            raise ValueError(f"rope_type must be 'llama3', got {self.rope_type!r}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor "
                f"({self.low_freq_factor}), got {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama, in the names of Hugging Face's config.json.

    `head_dim` None becomes ``hidden_size // num_attention_heads``. Raises ValueError
    that names the field, its value and what is allowed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self)
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({heads}), "
                f"got {shared}"
            )
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size must be a multiple of num_attention_heads ({heads}) "
                    f"where head_dim is None, got {self.hidden_size}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be positive and even, got {self.head_dim}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """The inverse of `dataclasses.asdict`; ValueError for a missing or odd key."""
        try:
            values = dict(values)
            if values.get("rope_scaling") is not None:
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
            return cls(**values)
        except TypeError as error:  # it names the key
            raise ValueError(f"not a LlamaConfig: {error}") from None


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, in S slots per sequence."""

    layers: list[tuple[jax.Array, jax.Array]]  # keys and values, each [B, S, K, D]
    mask: jax.Array  # bool [B, S], True where a slot holds a real token
    length: jax.Array  # int32 [], the number of slots written


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each pair of head dimensions, float32 [D // 2]."""
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
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


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """What q [B, T, N, D] reads of v [B, S, K, D] by its products with k [B, S, K, D].

    jax.nn.dot_product_attention computes the same, but its bfloat16 gradient fails
    under strict dtype promotion (jax 0.10.2). mask: bool, broadcast to [B, T, S].
    """
    batch, time, heads, size = q.shape
    q = q.reshape(batch, time, k.shape[2], -1, size)  # G = N / K query heads to each
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores / size**0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, time, heads, size)


class Attention(nnx.Module):
    """Causal self-attention in which groups of query heads share a key/value head."""

    def __init__(self, config: LlamaConfig, linear: Any):
        width, head_dim = config.hidden_size, config.head_dim
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
        mask: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        start: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = _rotate(self.q_proj(x).reshape(heads), cos, sin)
        k = _rotate(self.k_proj(x).reshape(heads), cos, sin)
        v = self.v_proj(x).reshape(heads)
        if past is not None:
            k = jax.lax.dynamic_update_slice_in_dim(past[0], k, start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(past[1], v, start, axis=1)
        y = _attend(q, k, v, mask)
        return self.o_proj(y.reshape(*x.shape[:2], -1)), (k, v)


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
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.dtype = config, dtype
        init = nnx.initializers.normal(0.02)
        common: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(
            nnx.Linear, use_bias=False, kernel_init=init, dtype=dtype, **common
        )
        norm = functools.partial(
            nnx.RMSNorm, epsilon=config.rms_norm_eps, dtype=jnp.float32, **common
        )
        vocabulary, width = config.vocab_size, config.hidden_size
        self.embed_tokens = nnx.Embed(
            vocabulary, width, embedding_init=init, dtype=dtype, **common
        )
        self.layers = nnx.List(
            DecoderLayer(config, linear, norm) for _ in range(config.num_hidden_layers)
        )
        self.norm = norm(width)
        if not config.tie_word_embeddings:
            self.lm_head = linear(width, vocabulary, preferred_element_type=jnp.float32)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Logits of the next token, and the cache where one was given.

        Args:
          tokens: int32 [B, T], each in [0, V).
          positions: int32 [B, T] for the rotary embeddings; by default the tokens'
            indices, counted from the cache's length where there is one.
          mask: bool [B, T], True at real tokens and False at padding, which no token
            attends to, neither now nor later through the cache. Default all True.
          cache: Of the tokens before these. Must have T slots left: under jit that
            cannot be checked, and a write past the end would land on earlier slots.

        Returns:
          float32 logits [B, T, V], or (logits, the cache with these tokens added).

        Raises:
          ValueError: `positions` is None and the tokens are more than the model's
            max_position_embeddings, or the tokens are more than the cache's slots.
        """
        batch, time = tokens.shape
        start = jnp.int32(0) if cache is None else cache.length
        index = start + jnp.arange(time, dtype=jnp.int32)
        if positions is None:
            if time > (limit := self.config.max_position_embeddings):
                raise ValueError(
                    f"{time} tokens are more than max_position_embeddings, {limit}"
                )
            positions = jnp.broadcast_to(index, (batch, time))
        if mask is None:
            mask = jnp.ones((batch, time), bool)
        if cache is not None:
            if time > (size := cache.mask.shape[1]):
                raise ValueError(f"{time} tokens are more than the {size} cache slots")
            mask = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, start, axis=1)
        # Causal by slot, not by position: padding may shift positions.
        slots = jnp.arange(mask.shape[1], dtype=jnp.int32)
        causal = slots[None, :] <= index[:, None]
        readable = causal[None] & mask[:, None, :]  # [B, T, S]
        frequencies = rope_frequencies(self.config)[None, None, :]
        angles = positions[:, :, None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]

        x = self.embed_tokens(tokens)
        written = []
        for i, layer in enumerate(self.layers):
            past = None if cache is None else cache.layers[i]
            x, keys_values = layer(x, cos, sin, readable, past, start)
            written.append(keys_values)
        x = self.norm(x).astype(self.dtype)
        # Logits in bfloat16 would be off by several per cent of a probability.
        if self.config.tie_word_embeddings:
            embedding = self.embed_tokens.embedding[...].astype(self.dtype)
            logits = jnp.matmul(x, embedding.T, preferred_element_type=jnp.float32)
        else:
            logits = self.lm_head(x)
        return logits if cache is None else (logits, Cache(written, mask, start + time))

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache with `length` slots for each of `batch_size` sequences."""
        config = self.config
        shape = (batch_size, length, config.num_key_value_heads, config.head_dim)
        # Every array is one of its own, so that the cache can be donated.
        layers = [
            (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
            for _ in range(config.num_hidden_layers)
        ]
        return Cache(layers, jnp.zeros((batch_size, length), bool), jnp.int32(0))
