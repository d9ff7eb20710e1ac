"""Texts that a model writes by itself, in place of the data it was pretrained on."""

import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

# Prompts int32 [B, T] and a key; the tokens that follow them, integers [B, N].
Sample = Callable[[np.ndarray[Any, np.dtype[np.int32]], jax.Array], Any]


def draw_texts(
    sample: Sample,
    count: int,
    *,
    bos_id: int,
    end_ids: Sequence[int] = (),
    key: jax.Array,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[int]]:
    """Draws texts from a model's own distribution, from the bos token on.

    They stand in for the pretraining data, which is often not at hand: replay them, or
    estimate the Fisher information of :func:`fisher_diagonal` on them. That asks for
    draws from the unchanged distribution: at temperature 1, without top-k or top-p.

    The model may be of any framework. Batch i is drawn with ``jax.random.fold_in(key,
    i)``, and all batches have one size, so a larger count only adds texts at the end.

    Args:
      sample: Continues prompts: a function of tokens int32 [B, T], a NumPy array, and a
        key. It returns integers [B, N], N >= 1, the new tokens alone, which this
        process can read. Tokens after the first end token are ignored.
      count: Number of texts, 1 or above.
      bos_id: The token that every text starts with; all prompts are this token, T = 1.
      end_ids: Tokens that end a text. A model that was trained on packed texts may
        write the bos token instead, so include that for such a model.
      key: From ``jax.random.key``.
      batch_size: B, the number of texts drawn at a time.
      progress: Called with the number of texts drawn so far and the count, after each
        batch.

    Returns:
      An iterator of texts. Each is a list of 2 to N + 1 tokens, the bos token and then
      the drawn ones up to the first end token, which is included. A batch is drawn when
      its first text is asked for.

    Raises:
      TypeError: An argument that must be an integer is none.
      ValueError: An argument is below its limit, or ``sample`` returned something else.

    >>> import jax
    >>> from mofo_jax.continual import draw_texts
    >>> def sample(prompts, key):  # a model that likes all tokens from 1 to 7 alike
    ...     return jax.random.randint(key, (len(prompts), 5), 1, 8)
    >>> texts = draw_texts(sample, 100, bos_id=0, end_ids=[7], key=jax.random.key(0))
    >>> all(text[0] == 0 and 7 not in text[1:-1] for text in texts)
    True

    The Fisher information of a model on its own texts, each of which is drawn when its
    gradient is computed:

    >>> import jax.numpy as jnp
    >>> from mofo_jax.continual import fisher_diagonal
    >>> texts = draw_texts(sample, 100, bos_id=0, key=jax.random.key(0))
    >>> @jax.jit
    ... @jax.grad
    ... def gradient(logits, tokens):  # of the negative log-likelihood
    ...     return -jnp.sum(jax.nn.log_softmax(logits)[tokens[1:]])
    >>> fisher = fisher_diagonal(gradient, jnp.zeros(8), map(jnp.array, texts))
    >>> fisher.shape
    (8,)

    References:
      Huang et al., `Mitigating Catastrophic Forgetting in Large Language Models with
      Self-Synthesized Rehearsal <https://arxiv.org/abs/2403.01244>`_, 2024.
    """
    for name, value, least in (
        ("count", count, 1),
        ("bos_id", bos_id, 0),
        ("batch_size", batch_size, 1),
    ):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be {least} or above, got {value}")
    # Apart, so that arguments are checked at the call and not at the first text.
    return _draw(
        sample, count, bos_id, set(map(int, end_ids)), key, batch_size, progress
    )


def _draw(
    sample: Sample,
    count: int,
    bos_id: int,
    end_ids: set[int],
    key: jax.Array,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[list[int]]:
    prompts = np.full((batch_size, 1), bos_id, np.int32)
    for batch, start in enumerate(range(0, count, batch_size)):
        new = np.asarray(sample(prompts, jax.random.fold_in(key, batch)))
        if (
            new.dtype.kind not in "iu"
            or new.shape[:-1] != (batch_size,)
            or not new.size
        ):
            raise ValueError(
                f"sample must return integers [{batch_size}, N], N >= 1, got "
                f"{new.dtype} {list(new.shape)}"
            )
        done = min(count, start + batch_size)
        if progress is not None:
            progress(done, count)
        for row in new[: done - start].tolist():
            end = next((j for j, token in enumerate(row) if token in end_ids), len(row))
            yield [bos_id, *row[: end + 1]]
