"""How far a model's predictions are from those of the pretrained model."""

import jax
import jax.numpy as jnp

from mofo_jax._checks import at_least_float32


def forward_kl(
    logits: jax.typing.ArrayLike, reference_logits: jax.typing.ArrayLike
) -> jax.Array:
    r"""The divergence KL(reference || model) at each position.

    .. math::
      \sum_v p_v \log \frac{p_v}{q_v}

    with p the reference's probabilities and q the model's, the softmax of their logits.
    On texts of the reference it measures forgetting, and as a term of the loss it
    limits forgetting. For the mean over the positions that count, use
    ``jnp.mean(forward_kl(...), where=mask)``.

    Args:
      logits: [..., V], floating, of the model that is trained.
      reference_logits: [..., V], floating, of the pretrained model; the same shape.

    Returns:
      [...], in nats. float32, or wider where ``logits`` are. A token that the reference
      rules out by a logit of minus infinity adds 0. One that only the model rules out
      makes the divergence infinite. No gradient reaches ``reference_logits``.

    Raises:
      TypeError: The logits are not floating.
      ValueError: The shapes differ, or there is no axis V.

    >>> import jax.numpy as jnp
    >>> from mofo_jax.continual import forward_kl
    >>> model = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
    >>> reference = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
    >>> forward_kl(model, reference).round(4)
    Array([0.    , 0.5108], dtype=float32)

    References:
      Kullback and Leibler, `On Information and Sufficiency
      <https://doi.org/10.1214/aoms/1177729694>`_, 1951.
    """
    logits, reference_logits = jnp.asarray(logits), jnp.asarray(reference_logits)
    for name, x in {"logits": logits, "reference_logits": reference_logits}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {x.dtype.name}")
    if not logits.ndim:
        raise ValueError("logits must have the shape [..., V], got a scalar")
    if reference_logits.shape != logits.shape:
        raise ValueError(
            f"reference_logits must have the shape of logits, {list(logits.shape)}, "
            f"got {list(reference_logits.shape)}"
        )
    log_q = jax.nn.log_softmax(at_least_float32(logits))
    reference = jax.lax.stop_gradient(reference_logits.astype(log_q.dtype))
    log_p = jax.nn.log_softmax(reference)
    p = jnp.exp(log_p)
    # 0 log 0 is 0. With `where` inside the product, XLA needs one more [..., V] buffer.
    terms = jnp.where(p > 0, p * (log_p - log_q), 0)
    return jnp.sum(terms, axis=-1)
