"""Continue a text with a Llama, at the likeliest token or drawn at random.

python -m examples.llama.generate --model MODEL --tokenizer TOKENIZER --prompt TEXT
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.typing import ArrayLike

from examples import terminal
from examples.llama.checkpoint import load_model
from examples.llama.model import Llama
from examples.llama.tokenizer import END, START, load_llama2c_tokenizer


def generate(
    model: Llama,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    eos_id: int | Sequence[int] | None = None,
) -> jax.Array:
    """Continues each sequence by up to `max_new_tokens` tokens.

    It is compiled once for each shape of `tokens` and `max_new_tokens`.

    Args:
      model: The model.
      tokens: int32 [B, T], the prompts, T >= 1, without padding.
      max_new_tokens: How many tokens to add, at least 1; with the T of the prompt at
        most the model's max_position_embeddings.
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
    tokens = np.asarray(tokens)
    config = model.config
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be integers [B, T], not empty, got {tokens.dtype} "
            f"{list(tokens.shape)}"
        )
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"tokens must be 0 to {config.vocab_size - 1}, got {tokens.min()} to "
            f"{tokens.max()}"
        )
    length, limit = tokens.shape[1], config.max_position_embeddings
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or above, got {max_new_tokens}")
    if length + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} and a prompt of {length} tokens exceed "
            f"the model's max_position_embeddings, {limit}"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or above, got {temperature}")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature {temperature} needs a key")
    return _generate(
        *nnx.split(model),
        jnp.asarray(tokens, jnp.int32),
        jnp.float32(temperature),
        key,
        jnp.asarray(np.ravel(() if eos_id is None else eos_id), jnp.int32),
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
    )


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "greedy")
)
def _generate(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: jax.Array,
    temperature: jax.Array,
    key: jax.Array | None,
    eos_ids: jax.Array,
    *,
    max_new_tokens: int,
    greedy: bool,
) -> jax.Array:
    model = nnx.merge(graph, state)
    batch, length = tokens.shape

    def choose(logits: jax.Array, step: jax.Array | int) -> jax.Array:
        if greedy:
            token = jnp.argmax(logits, axis=-1)
        else:
            step_key = jax.random.fold_in(key, step)
            token = jax.random.categorical(step_key, logits / temperature)
        return token.astype(jnp.int32)

    def ended(token: jax.Array) -> jax.Array:
        return jnp.isin(token, eos_ids)

    def going_on(carry: tuple) -> jax.Array:
        step, token, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(ended(token))

    def add(carry: tuple) -> tuple:
        step, token, cache, new = carry
        logits, cache = model(token[:, None], cache=cache)
        token = jnp.where(ended(token), token, choose(logits[:, 0], step))
        return step + 1, token, cache, new.at[:, step].set(token)

    # The last token is never read, so the cache has no slot for it.
    cache = model.init_cache(batch, length + max_new_tokens - 1)
    logits, cache = model(tokens, cache=cache)
    token = choose(logits[:, -1], 0)
    new = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(token)
    steps, token, _, new = jax.lax.while_loop(
        going_on, add, (jnp.int32(1), token, cache, new)
    )
    written = jnp.arange(max_new_tokens, dtype=jnp.int32) < steps
    return jnp.where(written[None], new, token[:, None])


@dataclasses.dataclass(kw_only=True)
class Args:
    model: Path
    """A llama2.c checkpoint, or a directory that was saved from training."""
    tokenizer: Path
    """Its tokenizer, in llama2.c's format."""
    prompt: str = ""
    """The text to continue."""
    max_new_tokens: int = 256
    """How many tokens to add, unless the text ends before."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 draws from the model's distribution."""
    seed: int = 0
    """Of the draws, at a temperature above 0."""


def continue_text(args: Args) -> str:
    """The prompt and its continuation; errors as of `generate` and the loaders."""
    if not 0 <= args.seed < 1 << 32:  # jax.random.key would drop the higher bits
        raise ValueError(f"seed must be 0 to {(1 << 32) - 1}, got {args.seed}")
    model = load_model(args.model)
    tokenizer = load_llama2c_tokenizer(args.tokenizer, model.config.vocab_size)
    prompt = [START, *tokenizer.encode(args.prompt).ids]
    new = generate(
        model,
        np.array([prompt]),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        key=jax.random.key(args.seed),
        # A model of many stories starts the next one with <s>.
        eos_id=(START, END),
    )
    return tokenizer.decode([*prompt, *new[0].tolist()])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: prints the text, or one line of error with exit code 2."""
    program = "python -m examples.llama.generate"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("generate"):
        text = continue_text(args)
    print(text)


if __name__ == "__main__":
    main()
