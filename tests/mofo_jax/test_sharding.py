"""The result is that of the global array, on any mesh, and no array is gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.programs import collectives
from mofo_jax import filter_by_momentum, mofo, top_fraction_mask

SPECS = [P("x"), P(None, "x"), P("y", "x"), P(None, ("x", "y"))]

pytestmark = pytest.mark.thorough


def leaf(seed=0, ties=True):
    x = np.random.default_rng(seed).normal(size=(64, 128)).astype(np.float32)
    return np.round(x, 1) if ties else x


def mesh_of(axis_type):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))


def assert_only_counts_cross(compiled, blocks):
    """What crosses devices is a number or flag per block, nothing of x's size."""
    moved = collectives(compiled)
    assert moved
    for kind, arrays, _ in moved:
        for dtype, shape in arrays:
            assert dtype in ("u32", "s32", "pred"), moved
            # Where blocks are spread over devices, XLA also moves their thresholds.
            assert np.prod(shape) <= (1 if blocks == 1 else 8 * blocks), moved
            assert blocks > 1 or kind == "all-reduce", moved


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("block_axes", [None, 0, 1])
def test_mask_of_a_sharded_array(axis_type, spec, block_axes):
    expected = top_fraction_mask(leaf(), 0.13, block_axes=block_axes, method="top_k")
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        x = jax.device_put(leaf(), NamedSharding(mesh, spec))
        select = jax.jit(lambda x: top_fraction_mask(x, 0.13, block_axes=block_axes))
        compiled = select.lower(x).compile().as_text()
        mask = select(x)
    np.testing.assert_array_equal(mask, expected)
    assert mask.sharding.is_equivalent_to(x.sharding, 2)
    assert_only_counts_cross(compiled, 1 if block_axes is None else 128)


@pytest.mark.parametrize("shape", [(40, 5), (56, 24), (8, 24), (1000, 48)])
def test_groups_do_not_cross_shards(shape):
    """Axes of few entries a shard, where a group of 16 would be gathered."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P("x")))
    select = jax.jit(lambda x: top_fraction_mask(x, 0.3))
    assert_only_counts_cross(select.lower(x).compile().as_text(), 1)


def test_arrays_of_one_shape_split_in_different_ways():
    """What they share, such as the index of their entries, is not moved either."""
    mesh = mesh_of(AxisType.Auto)
    specs = [P("x", "y"), P("y", "x"), P(None, "y"), P()]
    leaves = {
        str(spec): jax.device_put(leaf(i), NamedSharding(mesh, spec))
        for i, spec in enumerate(specs)
    }
    optimizer = filter_by_momentum(optax.sgd(0.1), 0.13, score="gradient")
    state = optimizer.init(leaves)
    update = jax.jit(optimizer.update)
    assert_only_counts_cross(update.lower(leaves, state).compile().as_text(), 1)
    updates, _ = update(leaves, state)
    for i, spec in enumerate(specs):
        expected = top_fraction_mask(leaf(i), 0.13, method="top_k")
        np.testing.assert_array_equal(updates[str(spec)] != 0, expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_optimizer_on_a_mesh(axis_type):
    params = {"w": leaf(1), "b": leaf(2)[0]}
    specs = {"w": P("x", "y"), "b": P("x")}
    optimizer = mofo(0.1, alpha=0.1, block_axes={"w": 1, "b": None})

    def run(params, place):
        params, state = place(params), None
        state = optimizer.init(params)
        for step in range(3):
            gradients = place({"w": leaf(3 + step), "b": leaf(9 + step)[1]})
            updates, state = jax.jit(optimizer.update)(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    expected, _ = run(params, lambda tree: jax.tree.map(jnp.asarray, tree))
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        shardings = {n: NamedSharding(mesh, s) for n, s in specs.items()}
        new, state = run(params, lambda tree: jax.device_put(tree, shardings))
    jax.tree.map(np.testing.assert_array_equal, new, expected)
    mu = optax.tree.get(state, "mu")
    assert all(mu[n].sharding.is_equivalent_to(shardings[n], mu[n].ndim) for n in mu)


@pytest.mark.parametrize("score", ["gradient", "update", "random"])
def test_scores_on_an_explicit_mesh(score):
    optimizer = filter_by_momentum(optax.sgd(0.1), 0.1, score=score, seed=3)
    expected, _ = optimizer.update(jnp.asarray(leaf()), optimizer.init(leaf()))
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(leaf(), NamedSharding(mesh, P("x", "y")))
        updates, _ = jax.jit(optimizer.update)(x, optimizer.init(x))
        assert jax.typeof(updates).sharding.spec == P("x", "y")
    np.testing.assert_array_equal(updates, expected)


def test_shard_map_with_automatic_axes():
    """Blocks are per shard over the manual axis, global over the automatic one."""
    mesh = mesh_of(AxisType.Auto)
    x = jax.device_put(leaf(), NamedSharding(mesh, P("x", "y")))
    select = jax.shard_map(
        lambda x: top_fraction_mask(x, 0.13),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
        axis_names={"x"},
    )
    expected = np.concatenate(
        [top_fraction_mask(part, 0.13) for part in np.split(leaf(), 4)]
    )
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(select)(x), expected)


# As in optax/_src/sharding_test.py, which is not written to be extended.
@pytest.fixture
def explicit_params():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, P(None, "x"))
    with jax.set_mesh(mesh):
        yield jnp.zeros((2, 8, 4), dtype=jnp.float16, out_sharding=sharding)


OPTIMIZERS = {
    "mofo": mofo(1.0),
    "mofo_decay": mofo(1.0, weight_decay=0.1),
    "mofo_blocks": mofo(1.0, block_axes=1),
    "filtered_lion": filter_by_momentum(optax.lion(1.0)),
    "random": filter_by_momentum(optax.sgd(1.0), score="random"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_init_with_abstract_input(name):
    params = jax.ShapeDtypeStruct(shape=(2, 4, 8), dtype=jnp.float32)
    assert OPTIMIZERS[name].init(params) is not None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_sharding_type(name, explicit_params):
    optimizer, params = OPTIMIZERS[name], explicit_params
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        updates, eager = optimizer.update(params, state, params)
        assert types(updates) == types(params)
        assert types(eager) == types(state)
        assert types(jax.jit(optimizer.init)(params)) == types(state)
        _, jitted = jax.jit(optimizer.update)(params, state, params)
    assert types(jitted) == types(eager)
