"""The Fisher information of a model on the texts that it writes itself."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mofo_jax.continual._fisher import fisher_diagonal
from mofo_jax.continual._own_texts import Sample, draw_texts


def self_fisher(
    gradient: Callable[[Any, np.ndarray[Any, np.dtype[np.int32]]], Any],
    params: Any,
    sample: Sample,
    count: int,
    *,
    bos_id: int,
    end_ids: Sequence[int] = (),
    key: jax.Array,
    batch_size: int = 32,
    factored: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The diagonal Fisher information of a model, from texts that it writes itself.

    :func:`fisher_diagonal` of the texts of :func:`draw_texts`, in one pass: a batch of
    texts is drawn when its first text is needed, and no text is kept. Make it once,
    before fine-tuning, and give it to :func:`scale_by_fisher` or
    :func:`add_distance_penalty`.

    Args:
      gradient: A function of the parameters and one text that returns the gradient of
        the text's negative log-likelihood, a pytree like the parameters. The text is a
        NumPy array, int32 [T]: the bos token, then what the model wrote. A jitted
        function compiles again for each T, so pad texts to one length before it. On a
        mesh, the gradient's sharding decides where the result is.
      params: Pytree of arrays, the pretrained parameters.
      sample: Continues prompts with these parameters; see :func:`draw_texts`. Draw at
        temperature 1, without top-k or top-p.
      count: Number of texts, 1 or above.
      bos_id: The token that every text starts with.
      end_ids: Tokens that end a text.
      key: From ``jax.random.key``.
      batch_size: Number of texts drawn at a time.
      factored: Whether leaves of two or more axes become a :class:`FactoredFisher`.
      progress: Called with the number of texts done and the count, once a text's
        gradient is computed. The pass waits for each gradient then.

    Returns:
      Pytree like the parameters, float32 (or wider where gradients are), 0 or above.

    Raises:
      TypeError: An argument that must be an integer is none.
      ValueError: An argument is below its limit, or ``sample`` returned something other
        than tokens.

    >>> import jax, jax.numpy as jnp
    >>> from mofo_jax.continual import self_fisher
    >>> logits = jnp.zeros(4)  # of a model that likes all of 4 tokens alike
    >>> def sample(prompts, key):
    ...     return jax.random.categorical(key, logits, shape=(len(prompts), 8))
    >>> @jax.jit
    ... @jax.grad
    ... def gradient(logits, tokens):
    ...     return -jnp.sum(jax.nn.log_softmax(logits)[tokens[1:]])
    >>> fisher = self_fisher(
    ...     gradient, logits, sample, 500, bos_id=0, key=jax.random.key(0))
    >>> jnp.allclose(fisher, 8 * 1 / 4 * 3 / 4, rtol=0.2)  # 8 tokens, p (1 - p) each
    Array(True, dtype=bool)
    """
    texts = draw_texts(
        sample,
        count,
        bos_id=bos_id,
        end_ids=end_ids,
        key=key,
        batch_size=batch_size,
    )
    examples = (np.array(text, np.int32) for text in texts)
    if progress is None:
        return fisher_diagonal(gradient, params, examples, factored=factored)
    done = 0

    def counted(params: Any, text: Any) -> Any:
        nonlocal done
        # Else the count would run ahead of the device.
        found = jax.block_until_ready(gradient(params, text))
        done += 1
        progress(done, count)
        return found

    return fisher_diagonal(counted, params, examples, factored=factored)
