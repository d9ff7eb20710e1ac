"""The score "gain": the largest decrease of the loss moves, what would climb never."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mofo_jax import filter_by_momentum, mofo, scale_by_mofo, testing
from mofo_jax.continual import FactoredFisher, scale_by_fisher

pytestmark = pytest.mark.usefixtures("program")


def gains_of(gradient, step):
    """In float64, exact for products of float32 and shorter; the step is added."""
    pair = (np.asarray(x, np.complex128) for x in (gradient, step))
    product = functools.reduce(lambda g, s: -(np.conj(g) * s).real, pair)
    return np.where(product < np.finfo(np.float32).tiny, 0.0, product)


def expected_mask(gains, alpha, block_axes=()):
    """From the definition: the k largest of a block, ties to the lower index."""
    axes = [a for a in range(gains.ndim) if a not in block_axes]
    rows = gains.transpose(*block_axes, *axes).reshape(
        -1, math.prod(gains.shape[a] for a in axes)
    )
    k = min(rows.shape[1], max(1, math.floor(alpha * rows.shape[1])))
    mask = np.zeros(rows.shape, bool)
    order = np.argsort(-rows, axis=1, kind="stable")[:, :k]
    np.put_along_axis(mask, order, True, axis=1)
    shape = [gains.shape[a] for a in (*block_axes, *axes)]
    return mask.reshape(shape).transpose(np.argsort([*block_axes, *axes])) & (gains > 0)


def replay(step):
    """A transformation whose update is a given one, whatever the gradient."""
    return optax.stateless(lambda gradients, params: step)


def moved(gradient, step, alpha, block_axes=None, method="search"):
    optimizer = filter_by_momentum(
        replay(step), alpha, score="gain", block_axes=block_axes, method=method
    )
    updates, _ = optimizer.update(gradient, optimizer.init(gradient))
    kept = np.asarray(updates)
    assert ((kept == np.asarray(step)) | (kept == 0)).all()
    return kept != 0


# Few values, so that there are ties, and entries that do not descend.
VALUES = st.lists(st.integers(-3, 3), min_size=24, max_size=24)


@given(VALUES, VALUES, st.sampled_from([0.05, 0.3, 0.6, 1.0]))
@settings(max_examples=25)
def test_the_largest_gains_move(gradient, step, alpha):
    gradient, step = (np.array(x, np.float32).reshape(4, 6) for x in (gradient, step))
    for block_axes, method in ((None, "search"), (None, "top_k"), ((0,), "search")):
        found = moved(gradient, step, alpha, block_axes, method)
        expected = expected_mask(gains_of(gradient, step), alpha, block_axes or ())
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_dtypes(dtype):
    rng = np.random.default_rng(0)
    first, second = rng.integers(-9, 9, (2, 40, 64))
    if dtype == "complex64":
        first, second = first + 1j * second, second - 2j * first
    gradient, step = (jnp.asarray(x).astype(dtype) for x in (first, second))
    expected = expected_mask(gains_of(gradient, step), 0.1)
    np.testing.assert_array_equal(moved(gradient, step, 0.1), expected)


def test_gradients_of_another_precision():
    """The product is of float32, where bfloat16 would have ties."""
    rng = np.random.default_rng(1)
    gradient = jnp.asarray(rng.normal(size=(8, 32)), jnp.float32)
    step = jnp.asarray(rng.normal(size=(8, 32)), jnp.bfloat16)
    expected = expected_mask(gains_of(gradient, step), 0.2)
    np.testing.assert_array_equal(moved(gradient, step, 0.2), expected)


def test_leaves_of_several_precisions():
    """Their gains are all of float32, and still are not read as one array."""
    rng = np.random.default_rng(7)
    # Of 16 arrays, four are stacked at a time where there is one CPU device.
    names = [(i, "bfloat16") for i in range(9)] + [(i, "float32") for i in range(7)]
    gradients, steps = (
        {f"{d}{i}": jnp.asarray(rng.normal(size=(8, 32)), d) for i, d in names}
        for _ in "gs"
    )
    optimizer = filter_by_momentum(replay(steps), 0.2, score="gain")
    updates, _ = optimizer.update(gradients, optimizer.init(gradients))
    for name, update in updates.items():
        expected = expected_mask(gains_of(gradients[name], steps[name]), 0.2)
        np.testing.assert_array_equal(update != 0, expected, name)


def test_what_would_climb_stays():
    gradient = jnp.array([1.0, -2.0, 3.0, 0.0, -0.0, 1e-30])
    step = jnp.array([1.0, 4.0, 5.0, 1.0, 1.0, -1e-30])
    # Of six, four may move; one does. The last gain is below float32's normal numbers.
    np.testing.assert_array_equal(moved(gradient, step, 0.7), np.arange(6) == 1)
    np.testing.assert_array_equal(moved(gradient, step, 1.0), np.arange(6) == 1)
    for scalar, moves in ((jnp.float32(-1), True), (jnp.float32(1), False)):
        assert moved(scalar, jnp.float32(2), 0.1) == moves


def test_all_that_descends_moves_at_alpha_one():
    rng = np.random.default_rng(2)
    gradient, step = (jnp.asarray(rng.normal(size=(9, 7)), "float32") for _ in "gs")
    np.testing.assert_array_equal(moved(gradient, step, 1.0), gradient * step < 0)


def test_nan_moves_first():
    gradient = jnp.array([1.0, jnp.nan, -5.0, -1.0])
    optimizer = filter_by_momentum(replay(jnp.ones(4)), 0.25, score="gain")
    updates, _ = optimizer.update(gradient, optimizer.init(gradient))
    np.testing.assert_array_equal(updates, [0, 1, 0, 0])


def test_the_sign_of_the_step():
    """Adam's direction is subtracted, and what an optimizer returns is added."""
    rng = np.random.default_rng(3)
    params = {"w": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)}
    three = {
        "mofo": mofo(0.1, 0.3, score="gain"),
        "chain": optax.chain(
            scale_by_mofo(0.3, score="gain"), optax.scale_by_learning_rate(0.1)
        ),
        "filter": filter_by_momentum(optax.adam(0.1), 0.3, score="gain"),
    }
    states = {name: optimizer.init(params) for name, optimizer in three.items()}
    adam = optax.scale_by_adam()
    dense = adam.init(params)
    for step in range(4):
        gradient = {"w": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)}
        found = {}
        for name, optimizer in three.items():
            found[name], states[name] = optimizer.update(gradient, states[name], params)
        with jax.numpy_dtype_promotion("standard"):
            direction, dense = adam.update(gradient, dense)
        expected = expected_mask(gains_of(gradient["w"], -direction["w"]), 0.3)
        assert expected.sum() == 14 or step > 0
        for updates in found.values():
            np.testing.assert_array_equal(updates["w"] != 0, expected)
            descent = float(jnp.sum(gradient["w"] * updates["w"]))
            assert descent < 0


@pytest.mark.thorough
def test_blocks_and_remembered_thresholds():
    """Over steps, with blocks, from the thresholds of the step before."""
    rng = np.random.default_rng(4)
    params = {"a": jnp.zeros((3, 40, 64)), "b": jnp.zeros((40, 64)), "c": jnp.zeros(5)}
    optimizer = scale_by_mofo(
        0.05, score="gain", block_axes={"a": 0, "b": None, "c": None}
    )
    update, state, adam = jax.jit(optimizer.update), optimizer.init(params), {}
    adam = optax.scale_by_adam()
    dense = adam.init(params)
    for _ in range(5):
        gradient = {
            name: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
            for name, x in params.items()
        }
        updates, state = update(gradient, state, params)
        with jax.numpy_dtype_promotion("standard"):
            direction, dense = jax.jit(adam.update)(gradient, dense)
        for name, found in updates.items():
            gains = gains_of(gradient[name], -direction[name])
            expected = expected_mask(gains, 0.05, (0,) if name == "a" else ())
            np.testing.assert_array_equal(found != 0, expected, name)
    assert update._cache_size() == 1


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind, program):
    if program == "one CPU device":
        pytest.skip("a mesh has several devices")
    rng = np.random.default_rng(5)
    gradient, params = rng.normal(size=(2, 16, 24)).astype(np.float32)
    optimizer = mofo(0.1, 0.2, score="gain")
    expected, _ = optimizer.update(
        jnp.asarray(gradient), optimizer.init(jnp.asarray(params)), jnp.asarray(params)
    )
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P("x", "y"))
        gradient, params = (jax.device_put(x, place) for x in (gradient, params))
        state = jax.jit(optimizer.init)(params)
        updates, _ = jax.jit(optimizer.update)(gradient, state, params)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    np.testing.assert_array_equal(updates != 0, expected != 0)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["mofo", "preconditioned", "filter_by_momentum"])
def test_memory_is_one_gain_an_entry(program, kind):
    """The gains take the place of the gradients; no updates are kept beside them."""
    n, leaves = 512, 8
    params = {str(i): jax.ShapeDtypeStruct((n, n), "float32") for i in range(leaves)}
    fisher = jax.tree.map(
        lambda _: FactoredFisher(*[jax.ShapeDtypeStruct((n,), "float32")] * 2), params
    )
    optimizer = {
        "mofo": mofo(0.1, score="gain"),
        "preconditioned": mofo(0.1, score="gain", precondition=scale_by_fisher()),
        "filter_by_momentum": filter_by_momentum(optax.adam(0.1), score="gain"),
    }[kind]

    def step(params, state, fisher):
        gradients = jax.grad(lambda p: sum(jnp.sum(jnp.sin(x)) for x in p.values()))
        updates, state = optimizer.update(
            gradients(params), state, params, fisher=fisher
        )
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    step = jax.jit(step, donate_argnums=(0, 1))
    compiled = step.lower(params, state, fisher).compile()
    copies = compiled.memory_analysis().temp_size_in_bytes / (4 * n * n * leaves)
    # The metric's divisor is kept a leaf at a time. What any optimizer may return has
    # to be kept until it is selected.
    most = {"mofo": 1.1, "preconditioned": 1.2, "filter_by_momentum": 2.1}[kind]
    # Away from one CPU device leaves are searched in stacks.
    assert copies < most + 0.2 * (program == "any device")


@pytest.mark.parametrize("mu_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"nesterov": True}])
def test_mofo_moves_by_what_it_ranks(mu_dtype, options):
    """Where the step is computed again it is that of the plain transformations."""
    rng = np.random.default_rng(8)
    draw = lambda: {"w": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)}
    params, fisher = draw(), jax.tree.map(jnp.square, draw())
    decay = options.pop("weight_decay", 0.0)
    adam = optax.scale_by_adam(mu_dtype=mu_dtype, **options)
    plain = filter_by_momentum(
        optax.chain(
            adam,
            scale_by_fisher(),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(0.1),
        ),
        0.3,
        score="gain",
    )
    optimizer = mofo(
        0.1,
        0.3,
        score="gain",
        precondition=scale_by_fisher(),
        mu_dtype=mu_dtype,
        weight_decay=decay,
        decay_selected_only=True,
        **options,
    )
    states = plain.init(params), optimizer.init(params)
    for _ in range(3):
        gradients = draw()
        expected, first = plain.update(gradients, states[0], params, fisher=fisher)
        found, second = optimizer.update(gradients, states[1], params, fisher=fisher)
        states = first, second
        chex.assert_trees_all_close(
            found, expected, rtol=1e-6 if mu_dtype is None else 1e-2
        )
        np.testing.assert_array_equal(found["w"] != 0, expected["w"] != 0)


def test_a_precondition_that_is_none():
    with pytest.raises(TypeError, match="precondition must be a gradient transform"):
        mofo(0.1, precondition=0.1)


@pytest.mark.thorough
def test_few_passes(program):
    rng = np.random.default_rng(6)
    optimizer = scale_by_mofo(0.1, score="gain")
    params = jnp.zeros((256, 1024))
    state, direction = optimizer.init(params), rng.normal(size=params.shape)
    with testing.count_passes() as passes:
        update = jax.jit(optimizer.update)
        for _ in range(8):
            noise = rng.normal(size=params.shape)
            gradient = jnp.asarray(direction + 3 * noise, jnp.float32)
            _, state = update(gradient, state, params)
            taken = passes()
    assert taken <= 8


def test_the_mesh_says_what_a_program_is_for():
    """Also where it is compiled ahead of time, on a machine of another kind."""
    optimizer = mofo(1e-3, score="gain")
    params = {"w": jnp.ones((8, 8))}
    state = optimizer.init(params)

    def barriers(kind, platform):
        device = jax.sharding.AbstractDevice(kind, 1, platform)
        mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            program = str(jax.make_jaxpr(optimizer.update)(params, state, params))
        return program.count("optimization_barrier")

    # The gain is stored by a barrier, or by a loop on CPUs, or by the search on TPUs.
    assert barriers("NVIDIA H100", "gpu") == barriers("cpu", "cpu") + 1
    with testing.search_program("TPUs"):
        assert barriers("TPU v5", "tpu") == barriers("cpu", "cpu") > 1
