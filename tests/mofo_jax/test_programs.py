"""The programs for GPUs and TPUs, on whatever there is, select what the others do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mofo_jax import filter_by_momentum, top_fraction_mask
from mofo_jax.testing import integer_limit, search_program

ALPHA = 0.2
# Several of a kind, which a GPU counts as one.
SHAPES = {
    **{f"a{i}": (6, 16) for i in range(5)},
    **{f"b{i}": (3, 5, 8) for i in range(3)},
    "c": (40,),
}
BLOCK_AXES = {name: 0 if name.startswith("b") else None for name in SHAPES}


def hard_values(step):
    """Ties, zeros, a scale that jumps and infinities."""
    rng = np.random.default_rng(step)
    x = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    x["a0"] = np.round(x["a0"])
    x["a1"] = np.sign(x["a1"])
    x["a2"] *= 0 if step == 1 else 10.0 ** (15 * step)
    x["a3"].flat[::3] = np.inf
    x["b0"] = np.round(2 * x["b0"])
    x["c"][:30] = 0
    return x


def by_gradient(gradients, *_):
    return gradients


@pytest.mark.parametrize("limit", [2**31, 16])
@pytest.mark.parametrize("program", ["one GPU", "TPUs"])
def test_trees(program, limit):
    optimizer = filter_by_momentum(
        optax.identity(), ALPHA, score=by_gradient, block_axes=BLOCK_AXES
    )
    update = jax.jit(optimizer.update)
    with search_program(program), integer_limit(limit):
        state = optimizer.init(hard_values(0))
        for step in range(3):
            x = hard_values(step)
            updates, state = update({n: v + 0 for n, v in x.items()}, state)
            for name, value in x.items():
                axes = BLOCK_AXES[name]
                mask = top_fraction_mask(
                    jnp.asarray(value), ALPHA, block_axes=axes, method="top_k"
                )
                kept = np.where(mask, value, 0)
                np.testing.assert_array_equal(updates[name], kept, f"{name}, {step}")


def test_tpus_on_a_mesh():
    """Their first count leaves arrays as they lie, and counts over all of them."""
    rng = np.random.default_rng(0)
    x = {n: jnp.asarray(np.round(4 * rng.normal(size=(16, 24)))) for n in "ab"}
    expected = {n: top_fraction_mask(v, ALPHA, method="top_k") for n, v in x.items()}
    optimizer = filter_by_momentum(optax.identity(), ALPHA, score=by_gradient)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    places = {"a": P("x", "y"), "b": P(None, "x")}
    with jax.set_mesh(mesh), search_program("TPUs"):
        x = {n: jax.device_put(v, NamedSharding(mesh, places[n])) for n, v in x.items()}
        step = jax.jit(optimizer.update).lower(x, jax.jit(optimizer.init)(x)).compile()
        updates, _ = step(x, jax.jit(optimizer.init)(x))
    for name, mask in expected.items():
        np.testing.assert_array_equal(updates[name], np.where(mask, x[name], 0))
        assert updates[name].sharding.spec == places[name]
    assert "all-gather" not in step.as_text()
