"""Continue token sequences with a key-value cache, many rows at a time."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from examples.checks import check_least
from examples.llama.model.llama import Cache, Llama

SHORTEST = 32  # tokens, to which shorter texts are padded


class Decoding(NamedTuple):
    """How far B texts have come, from `prefill` to `decode` and from call to call.

    A caller may replace `ended`: a row that has ended only repeats its last token.
    """

    cache: Cache  # of all tokens but the last
    token: jax.Array  # int32 [B], the last one
    position: jax.Array  # int32 [B], its position, counted from its row's first token
    ended: jax.Array  # bool [B]
    step: jax.Array  # int32 [], how many tokens were added, which tells draws apart


def generate(
    model: Llama,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    mask: ArrayLike | None = None,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    eos_id: int | Sequence[int] | None = None,
) -> jax.Array:
    """Continues each sequence by up to `max_new_tokens` tokens.

    At temperature 0 a row gets the tokens that it would get alone, without padding. It
    is compiled once for each shape of `tokens` and `max_new_tokens`.

    Args:
      model: The model.
      tokens: int32 [B, T], the prompts, T >= 1.
      max_new_tokens: How many tokens to add, at least 1; with the longest prompt at
        most the model's max_position_embeddings.
      mask: bool [B, T], True at a prompt's tokens and False at the padding on their
        left. Every row has at least one True. Default all True.
      temperature: 0 takes the likeliest token; above 0, a token is drawn with its
        logit divided by it.
      key: For drawing, from `jax.random.key`; needed at a temperature above 0.
      eos_id: A token, or several, after which a sequence has ended. It is repeated
        from there on, and generation stops when every sequence has ended.

    Returns:
      int32 [B, max_new_tokens], the new tokens alone.

    Raises:
      ValueError: An argument is outside these limits.
    """
    tokens, mask = _check_prompts(model, tokens, mask)
    _check_options(max_new_tokens, temperature, key)
    check_room(model, mask.sum(axis=1).max(), max_new_tokens)
    decoding = prefill(model, tokens, mask=mask, max_new_tokens=max_new_tokens)
    return decode(
        model,
        decoding,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        key=key,
        eos_id=eos_id,
    )[0]


def check_room(model: Llama, longest: int, max_new_tokens: int) -> None:
    """Raises ValueError where a prompt and its continuation exceed the positions."""
    limit = model.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} and a prompt of {longest} tokens exceed "
            f"the model's max_position_embeddings, {limit}"
        )


def left_padded(
    prompts: Sequence[Sequence[int] | np.ndarray], rows: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as tokens int32 [rows, width] and the mask of them, for `generate`.

    Rows beyond the prompts hold one token of no meaning, for batches of few shapes.
    """
    tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    mask[:, -1] = True
    for i, prompt in enumerate(prompts):
        tokens[i, -len(prompt) :], mask[i, -len(prompt) :] = prompt, True
    return tokens, mask


def padded_width(longest: int, most: int) -> int:
    """The next power of two, up to `most`, so that few widths are compiled."""
    return min(max(SHORTEST, 1 << (longest - 1).bit_length()), most)


def prefill(
    model: Llama,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    mask: ArrayLike | None = None,
) -> Decoding:
    """Reads prompts, for `decode` to continue them a few tokens at a time.

    Args:
      model: The model.
      tokens: int32 [B, T], see `generate`.
      max_new_tokens: How many tokens all calls of `decode` together may add.
      mask: bool [B, T], see `generate`.

    Raises:
      ValueError: An argument is outside these limits.
    """
    tokens, mask = _check_prompts(model, tokens, mask)
    _check_options(max_new_tokens)
    # The last token of all is never read, so the cache has no slot for it.
    slots = tokens.shape[1] + max_new_tokens - 1
    return _prefill(*nnx.split(model), tokens, mask, slots=slots)


def decode(
    model: Llama,
    decoding: Decoding,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    eos_id: int | Sequence[int] | None = None,
) -> tuple[jax.Array, Decoding]:
    """Adds `max_new_tokens` tokens to every text, unless all of them end before.

    Args:
      model: The model.
      decoding: What `prefill` or the call before returned. Its cache is used up, and
        must have room: a write past its end would land on earlier tokens.
      max_new_tokens: At least 1; compiled once for each.
      temperature: See `generate`.
      key: See `generate`. Pass the same one in every call.
      eos_id: See `generate`.

    Returns:
      int32 [B, max_new_tokens], and what the next call needs.

    Raises:
      ValueError: An argument is outside these limits.
    """
    _check_options(max_new_tokens, temperature, key)
    return _decode(
        *nnx.split(model),
        decoding.cache,
        decoding[1:],
        np.float32(temperature),
        key,
        np.ravel(() if eos_id is None else eos_id).astype(np.int32),
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
    )


def _check_prompts(
    model: Llama, tokens: ArrayLike, mask: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    tokens, vocabulary = np.asarray(tokens), model.config.vocab_size
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be integers [B, T], not empty, got {tokens.dtype} "
            f"{list(tokens.shape)}"
        )
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"tokens must be 0 to {vocabulary - 1}, got {tokens.min()} to "
            f"{tokens.max()}"
        )
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    if mask.shape != tokens.shape or mask.dtype != bool:
        raise ValueError(
            f"mask must be bool {list(tokens.shape)}, got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    wrong = ~mask[:, -1] | np.any(mask[:, :-1] & ~mask[:, 1:], axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            "mask must be False at padding on the left and True at one or more tokens "
            f"after it, got {mask[row].astype(int).tolist()} in row {row}"
        )
    return tokens.astype(np.int32), mask


def _check_options(
    max_new_tokens: int, temperature: float = 0.0, key: jax.Array | None = None
) -> None:
    check_least("max_new_tokens", max_new_tokens, 1)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or above, got {temperature}")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature {temperature} needs a key")


@functools.partial(jax.jit, static_argnums=0, static_argnames="slots")
def _prefill(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    slots: int,
) -> Decoding:
    model = nnx.merge(graph, state)
    batch, length = tokens.shape
    cache = model.init_cache(batch, slots)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    if length > 1:
        # Only `decode` needs logits, of the last token: all others' would fill memory.
        _, cache = model(
            tokens[:, :-1], positions=positions[:, :-1], mask=mask[:, :-1], cache=cache
        )
    ended = jnp.zeros(batch, bool)
    return Decoding(cache, tokens[:, -1], positions[:, -1], ended, jnp.int32(0))


# The number of new tokens, they themselves [B, max_new_tokens], and where they end.
_Carry = tuple[jax.Array, jax.Array, Decoding]


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("max_new_tokens", "greedy"),
    donate_argnames="cache",
)
def _decode(
    graph: nnx.GraphDef,
    state: nnx.State,
    cache: Cache,
    rows: tuple[jax.Array, ...],
    temperature: jax.Array,
    key: jax.Array | None,
    eos_ids: jax.Array,
    *,
    max_new_tokens: int,
    greedy: bool,
) -> tuple[jax.Array, Decoding]:
    model = nnx.merge(graph, state)
    start = Decoding(cache, *rows)

    def choose(logits: jax.Array, step: jax.Array) -> jax.Array:
        if greedy:
            token = jnp.argmax(logits, axis=-1)
        else:
            assert key is not None, "_check_options asks for it"
            step_key = jax.random.fold_in(key, step)
            token = jax.random.categorical(step_key, logits / temperature)
        return token.astype(jnp.int32)

    def going_on(carry: _Carry) -> jax.Array:
        count, _, now = carry
        return (count < max_new_tokens) & ~jnp.all(now.ended)

    def add(carry: _Carry) -> _Carry:
        count, new, now = carry
        logits, cache = model(
            now.token[:, None], positions=now.position[:, None], cache=now.cache
        )
        token = jnp.where(now.ended, now.token, choose(logits[:, 0], now.step))
        ended = now.ended | jnp.isin(token, eos_ids)
        now = Decoding(cache, token, now.position + 1, ended, now.step + 1)
        return count + 1, new.at[:, count].set(token), now

    new = jnp.zeros((start.token.size, max_new_tokens), jnp.int32)
    count, new, end = jax.lax.while_loop(going_on, add, (jnp.int32(0), new, start))
    written = jnp.arange(max_new_tokens, dtype=jnp.int32) < count
    return jnp.where(written[None], new, end.token[:, None]), end
