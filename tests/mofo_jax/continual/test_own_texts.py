"""Texts that a model writes, with models whose distribution is known."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mofo_jax.continual import draw_texts, fisher_diagonal

KEY = jax.random.key(0)
BOS, END = 1, 2


def uniform(prompts, key):
    """Four tokens, each from 2 to 5."""
    return jax.random.randint(key, (len(prompts), 4), 2, 6)


def test_by_hand():
    rows = [[3, END, 4, END], [END, 3, 3, 3], [3, 4, 5, 3], [5, 5, 5, END]]
    calls = []

    def sample(prompts, key):
        calls.append((prompts.tolist(), key))
        return np.array(rows[:2] if len(calls) == 1 else rows[2:])

    options = {"bos_id": BOS, "end_ids": [END], "key": KEY, "batch_size": 2}
    texts = list(draw_texts(sample, 3, **options))
    assert texts == [[BOS, 3, END], [BOS, END], [BOS, 3, 4, 5, 3]]
    assert [prompts for prompts, _ in calls] == [[[BOS], [BOS]]] * 2
    for i, (_, key) in enumerate(calls):
        assert key == jax.random.fold_in(KEY, i)


@hypothesis.given(st.integers(1, 40), st.integers(1, 7), st.sets(st.integers(2, 5)))
def test_every_text(count, batch_size, ends):
    def draw(count):
        return list(
            draw_texts(
                uniform,
                count,
                bos_id=BOS,
                end_ids=sorted(ends),
                key=KEY,
                batch_size=batch_size,
            )
        )

    texts = draw(count)
    assert len(texts) == count
    for text in texts:
        assert text[0] == BOS and 2 <= len(text) <= 5
        assert not ends & set(text[1:-1])
        assert len(text) == 5 or text[-1] in ends
    # A larger count only adds texts.
    assert draw(count + 3)[:count] == texts


def test_one_batch_at_a_time():
    done = []
    texts = draw_texts(
        uniform,
        5,
        bos_id=BOS,
        key=KEY,
        batch_size=2,
        progress=lambda *numbers: done.append(numbers),
    )
    assert not done
    next(texts)
    assert done == [(2, 5)]
    assert len(list(texts)) == 4 and done == [(2, 5), (4, 5), (5, 5)]


def test_fisher_of_a_categorical_model():
    """At logits z it is p (1 - p), in the mean over the model's own draws."""
    logits = jnp.array([0.0, 0.5, -1.0, 2.0])

    def sample(prompts, key):
        return jax.random.categorical(key, logits, shape=(len(prompts), 1))

    def loss(logits, tokens):
        return -jax.nn.log_softmax(logits)[tokens[1]]

    texts = draw_texts(sample, 4000, bos_id=9, key=KEY, batch_size=500)
    gradient = jax.jit(jax.grad(loss))
    fisher = fisher_diagonal(gradient, logits, map(jnp.array, texts))
    p = jax.nn.softmax(logits)
    np.testing.assert_allclose(fisher, p * (1 - p), rtol=0.1)


@pytest.mark.parametrize("name", ["count", "batch_size", "bos_id"])
def test_bad_integers(name):
    options = {"count": 1, "bos_id": 0, "key": KEY}
    with pytest.raises(ValueError, match=f"{name} must be [01] or above, got -1"):
        draw_texts(uniform, **options | {name: -1})  # before the first text
    with pytest.raises(TypeError, match=f"{name} must be an integer, got None"):
        draw_texts(uniform, **options | {name: None})


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (np.zeros((2, 4)), r"float64 \[2, 4\]"),
        (np.zeros((1, 4), int), r"int64 \[1, 4\]"),
        (np.zeros(2, int), r"int64 \[2\]"),
        (np.zeros((2, 0), int), r"int64 \[2, 0\]"),
    ],
)
def test_bad_samples(result, got):
    texts = draw_texts(lambda prompts, key: result, 3, bos_id=0, key=KEY, batch_size=2)
    message = rf"sample must return integers \[2, N\], N >= 1, got {got}"
    with pytest.raises(ValueError, match=message):
        next(texts)
