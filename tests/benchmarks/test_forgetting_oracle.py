"""The oracle's matrix is the curvature of the divergence from the model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.forgetting_oracle import fisher_product, oracle
from examples.llama.checkpoints.loading import load_model
from examples.llama.training.loop import train
from mofo_jax.continual import forward_kl
from tests.examples.llama.runs import config_of, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.mark.slow
def test_product_is_with_the_curvature_of_the_divergence(files):
    model = load_model(files["model"])
    graph, params = nnx.split(model)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 260, (2, 6)), jnp.int32)
    inside = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    batch = {
        "tokens": tokens,
        "positions": jnp.broadcast_to(jnp.arange(6), (2, 6)),
        "segment_ids": inside,
        "loss_mask": (inside > 0).at[:, 0].set(False),
    }

    def divergence(step):
        """From the model to one a step away, the mean over the 8 counted tokens."""
        total = 0.0
        for row, length in ((0, 6), (1, 4)):
            text = tokens[row : row + 1, : length - 1]
            before = nnx.merge(graph, params)(text)
            after = nnx.merge(graph, optax.tree.add(params, step))(text)
            total += jnp.sum(forward_kl(after, before))
        return total / 8

    def curvature(vector):
        def along(t):
            return divergence(optax.tree.scale(t, vector))

        return jax.grad(jax.grad(along))(0.0)

    draw = lambda: jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
    )
    u, v = draw(), draw()
    with jax.numpy_dtype_promotion("standard"):
        squares = [curvature(x) for x in (u, v, optax.tree.add(u, v))]
        product = fisher_product(graph, params, batch, v)
    # The divergence is flat at the model itself, and its curvature is the matrix.
    found = [float(optax.tree.vdot(x, product)) for x in (v, u)]
    expected = [squares[1], (squares[2] - squares[0] - squares[1]) / 2]
    np.testing.assert_allclose(
        found, expected, rtol=1e-3, atol=1e-3 * float(squares[1])
    )


@pytest.mark.slow
def test_a_run(files, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.forgetting_oracle.LENGTH", 16)
    config = config_of(files, tmp_path / "out", steps=4, learning_rate=1e-3)
    found = train(config, progress=False, optimizer=oracle)
    assert found["after"]["eval_loss"] < found["before"]["eval_loss"]
