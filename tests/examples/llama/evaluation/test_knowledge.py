"""The scores of choices, beside those of a plain forward pass of each text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama.checkpoints.loading import load_model
from examples.llama.evaluation.items import Item, Items
from examples.llama.evaluation.knowledge import Probe, interval, summary
from examples.llama.model.lora import add_lora
from examples.llama.model.sharding import make_mesh, parameter_sharding
from examples.llama.text.tokenizer import load_tokenizer

WORDS = ["a", "cat", "sat", "on", "the", "mat", "and", "saw", "that", "it", "was"]


def items_of(count, longest=3, seed=0):
    """Items with choices of one to `longest` words."""
    rng = np.random.default_rng(seed)
    items = []
    for n in range(count):
        words = rng.choice(WORDS, size=(2 + n % 3, longest)).tolist()
        choices = {" ".join(x[: 1 + i % longest]) for i, x in enumerate(words)}
        choices = (*sorted(choices), "o")
        prompt = " ".join(rng.choice(WORDS, size=1 + n % 4))
        items.append(Item(prompt, choices, n % len(choices), relation=str(n % 2)))
    return Items(tuple(items), "made", {})


@pytest.fixture(scope="module")
def tokenizer(files):
    return load_tokenizer(files["model"])


def probe_of(model, tokenizer, items, mesh):
    limit = model.config.max_position_embeddings
    return Probe(items, tokenizer, mesh, max_position_embeddings=limit)


def alone(model, tokenizer, items):
    """Each choice after its prompt, in a row of its own."""
    forward = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0]))
    found = []
    for item in items.items:
        scores = []
        for choice in item.choices:
            ((prompt, after),) = tokenizer.encode_pieces([(item.prompt, f" {choice}")])
            tokens = [tokenizer.bos_id, *prompt, *after]
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(tokens)] = tokens
            logs = np.asarray(forward(model, padded))
            places = np.arange(len(prompt), len(tokens) - 1)
            scores.append(logs[places, after].sum(dtype=np.float64))
        found.append(scores)
    return found


@pytest.mark.parametrize("mesh", ["fsdp=1", "data=2,fsdp=2,tensor=2"])
def test_scores_are_those_of_each_text_alone(files, tokenizer, mesh):
    items = items_of(40)
    plain = load_model(files["model"])
    mesh = make_mesh(mesh)
    model = load_model(files["model"], sharding=parameter_sharding(mesh))
    found = probe_of(model, tokenizer, items, mesh).log_likelihoods(*nnx.split(model))
    for scores, expected in zip(found, alone(plain, tokenizer, items), strict=True):
        np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_right(files, tokenizer):
    items, mesh = items_of(30), make_mesh("fsdp=1")
    model = load_model(files["model"])
    best = [int(np.argmax(scores)) for scores in alone(model, tokenizer, items)]
    probe = probe_of(model, tokenizer, items, mesh)
    expected = [item.answer == i for item, i in zip(items.items, best, strict=True)]
    assert 0 < sum(expected) < 30
    np.testing.assert_array_equal(probe.right(*nnx.split(model)), expected)
    # And all of them are, where the answers are what the model says.
    told = [item._replace(answer=i) for item, i in zip(items.items, best, strict=True)]
    probe = probe_of(model, tokenizer, items._replace(items=tuple(told)), mesh)
    assert probe.right(*nnx.split(model)).all()


def test_lora_counts(files, tokenizer):
    items, mesh = items_of(10), make_mesh("fsdp=1")
    model = load_model(files["model"])
    probe = probe_of(model, tokenizer, items, mesh)
    before = probe.log_likelihoods(*nnx.split(model))
    add_lora(model, 2, 16.0, rngs=nnx.Rngs(0), sharding=parameter_sharding(mesh))
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    same = probe.log_likelihoods(graph, lora, rest)
    np.testing.assert_allclose(np.concatenate(same), np.concatenate(before), rtol=1e-5)
    moved = jax.tree.map(lambda x: x + jnp.asarray(0.3, x.dtype), lora)
    other = probe.log_likelihoods(graph, moved, rest)
    assert np.abs(np.concatenate(other) - np.concatenate(before)).max() > 1e-2
    expected = alone(nnx.merge(graph, moved, rest), tokenizer, items)
    np.testing.assert_allclose(
        np.concatenate(other), np.concatenate(expected), rtol=1e-4
    )


def test_a_long_item_widens_the_rows(files, tokenizer):
    """Its branches together exceed the model's positions, though none does alone."""
    long = Item("the cat", tuple("abcdefgh"[i] * 40 for i in range(8)), 0)
    items = Items((*items_of(3).items, long), "made", {})
    model = load_model(files["model"])
    probe = probe_of(model, tokenizer, items, make_mesh("fsdp=1"))
    found = probe.log_likelihoods(*nnx.split(model))
    expected = alone(model, tokenizer, items)
    np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-4)
    too_long = Items((Item("a" * 60, ("b" * 9, "c"), 0),), "made", {})
    with pytest.raises(ValueError, match=r"made: an item has \d+ tokens, the mod"):
        probe_of(model, tokenizer, too_long, make_mesh("fsdp=1"))


def test_summary():
    items = items_of(4)
    right = np.array([True, False, True, True])
    found = summary(items, right)
    assert found["right"] == 0.75
    assert found["relations"]["0"]["right"] == 1.0
    assert found["relations"]["1"]["right"] == 0.5
    assert found["relations"]["0"]["items"] == 2
    assert found["sha256"] == items.describe()["sha256"]
    # Wilson's interval of 8 in 10, as in textbooks.
    low, high = interval(np.arange(10) < 8)
    assert (low, high) == pytest.approx((0.490, 0.943), abs=1e-3)
