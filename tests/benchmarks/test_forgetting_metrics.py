"""The ablation's metrics and scores, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.forgetting_methods import METHODS
from benchmarks.forgetting_metrics import (
    DAMPING,
    fatigue,
    kronecker,
    own_texts,
    second_order,
    texts_at,
)
from benchmarks.forgetting_optimizers import keep_with
from examples.llama.model.sharding import make_mesh
from examples.llama.text.batches import ordered_batches
from examples.llama.training.fisher import estimate_fisher, row_gradient
from examples.llama.training.loop import train
from tests.examples.llama.runs import config_of, write_files

LENGTH = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    changes = {"max_length": LENGTH, "importance_texts": 3, "alpha": 1.0}
    return config_of(write_files(root), root / "out", method="keep", **changes)


@pytest.fixture(scope="module")
def own(config):
    return own_texts(config)


@pytest.fixture(scope="module")
def gradients(config, own):
    """Of each text."""
    graph, params = nnx.split(own.model)
    gradient = row_gradient(graph, make_mesh("fsdp=1"), config.seed)
    return [gradient(params, row) for row in ordered_batches(own.rows, 1)]


def named(tree):
    return {jax.tree_util.keystr(k): x for k, x in jax.tree.leaves_with_path(tree)}


def first_step(optimizer, own, **extra):
    """Of gradients all 1, whose direction is Adam's first: 1 everywhere."""
    params = nnx.state(own.model)
    ones = optax.tree.ones_like(params)
    extra |= {"learning_rate": jnp.float32(1)}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(ones, optimizer.init(params), params, **extra)
    return updates


@pytest.mark.slow
def test_kronecker(config, own, gradients):
    """A step solves with the whole matrix that the factors stand for."""
    updates = named(first_step(kronecker(config), own))
    by_text = [named(tree) for tree in gradients]
    size = sum(x.size for x in updates.values())
    total = sum(float(jnp.sum(x**2)) for tree in by_text for x in tree.values())
    mean = total / len(by_text) / size
    ratios = []
    for name in ("kernel", "scale"):  # a matrix, and a leaf of one axis
        name = next(n for n in updates if n.endswith(f"{name}'].value") or name in n)
        found = np.asarray(updates[name], np.float64)
        g = [np.asarray(tree[name], np.float64) for tree in by_text]
        if found.ndim == 1:
            expected = 1 / (np.mean([x**2 for x in g], axis=0) / mean + DAMPING)
        else:
            left = np.mean([x @ x.T for x in g], axis=0)
            right = np.mean([x.T @ x for x in g], axis=0)
            whole = np.kron(left, right) / np.trace(left) / mean
            whole += DAMPING * np.eye(len(whole))
            expected = np.linalg.solve(whole, np.ones(found.size)).reshape(found.shape)
            # What would climb stays.
            assert ((found == 0) == (expected <= 0)).mean() > 0.99
        moved = (found != 0) & (expected > 0.1)
        ratios.append(found[moved] / -expected[moved])
    # All leaves have the same scale.
    ratios = np.concatenate(ratios)
    np.testing.assert_allclose(ratios, np.median(ratios), rtol=0.02)


def test_texts_at_the_models_own_temperature_are_those_of_keep(config, own):
    fisher = estimate_fisher(
        *nnx.split(own.model),
        own.rows,
        len(own.rows),
        make_mesh("fsdp=1"),
        seed=config.seed,
        factored=True,
    )
    keep = first_step(keep_with()(config), own, importance=fisher)
    found = first_step(texts_at(1.0)(config), own)
    jax.tree.map(np.testing.assert_array_equal, found, keep)
    (text, *others) = own_texts(config, temperature=0.0).rows.take()["tokens"]
    assert all((text == other).all() for other in others)


def test_second_order(config, own, gradients):
    score = second_order(config)
    params = nnx.state(own.model)
    ones, steps = optax.tree.ones_like(params), optax.tree.full_like(params, -0.5)
    found = named(score(ones, steps, None, params))
    tokens = own.rows.take()["loss_mask"].sum()
    for name, x in found.items():
        fisher = sum(np.asarray(named(tree)[name]) ** 2 for tree in gradients) / tokens
        expected = np.maximum(0, 0.5 - fisher * 0.25 / 2)
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-6)
    assert min(float(x.min()) for x in found.values()) < 0.5


def test_fatigue(config, own):
    score = fatigue(config)
    start = nnx.state(own.model)
    ones, steps = optax.tree.ones_like(start), optax.tree.full_like(start, -0.5)
    moved = jax.tree.map(lambda p: p - 3 * config.learning_rate, start)
    for params, expected in ((start, 0.5), (moved, 0.125)):
        for x in jax.tree.leaves(score(ones, steps, None, params)):
            np.testing.assert_allclose(x, expected, rtol=1e-3)
    for x in jax.tree.leaves(score(ones, ones, None, start)):  # these would climb
        assert not x.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["refreshed", "kronecker", "second-order", "fatigue"])
def test_a_run(name, tmp_path):
    config = config_of(
        write_files(tmp_path), tmp_path / "out", method="keep", steps=6, alpha=0.1
    )
    found = train(config, progress=False, optimizer=METHODS[name].optimizer)
    assert found["after"]["eval_loss"] < found["before"]["eval_loss"]
