"""The step in the pretrained model's metric, against numbers computed by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mofo_jax import filter_by_momentum
from mofo_jax.continual import FactoredFisher, scale_by_fisher

# The means are 1 and 4 by leaf, 2 over all entries.
FISHER = {"a": jnp.array([0.0, 1.0, 1.0, 2.0]), "b": jnp.array([[4.0, 4.0]])}
UPDATES = {"a": jnp.array([1.0, -2.0, 0.5, 4.0]), "b": jnp.array([[3.0, -1.0]])}
RNG = np.random.default_rng(0)

pytestmark = pytest.mark.thorough


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def apply(transformation, updates=UPDATES, **extra):
    """The second of two equal steps, which has the mean square of the first."""
    return apply_twice(transformation, updates, **extra)[1]


def apply_twice(transformation, updates=UPDATES, **extra):
    state = transformation.init(updates)
    update = jax.jit(transformation.update)
    first, state = update(updates, state, **extra)
    return first, update(updates, state, **extra)[0]


def expected_of(updates, fisher, damping=0.01):
    """What `apply` gives, in NumPy."""
    fisher, updates = (
        {k: np.asarray(x) for k, x in t.items()} for t in (fisher, updates)
    )
    mean = np.mean(np.concatenate([f.ravel() for f in fisher.values()]))
    s = {k: u / (fisher[k] / mean + damping) for k, u in updates.items()}
    flat = np.concatenate([x.ravel() for x in s.values()])
    rms = np.sqrt(np.mean(np.abs(flat) ** 2))
    return {k: x / rms for k, x in s.items()}


def test_by_hand():
    first, updates = apply_twice(scale_by_fisher(FISHER, damping=0.5))
    # Divided by F / 2 + 0.5.
    scaled = {"a": jnp.array([2.0, -2.0, 0.5, 8 / 3]), "b": jnp.array([[1.2, -0.4]])}
    chex.assert_trees_all_close(first, jax.tree.map(lambda x: x / 2, scaled), rtol=1e-6)
    rms = np.sqrt((4 + 4 + 0.25 + 64 / 9 + 1.44 + 0.16) / 6)
    expected = jax.tree.map(lambda x: x / rms, scaled)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_running_mean_square():
    scale = scale_by_fisher(damping=1.0, decay=0.75)  # halves, as F is 1
    state = scale.init(UPDATES)
    unit = jax.tree.map(lambda x: jnp.full_like(x, 2.0), UPDATES)
    triple = jax.tree.map(lambda x: 3 * x, unit)
    for updates, square in (
        (unit, 1.0),  # the first step has no mean yet
        (triple, 1.0),
        (unit, (0.75 * 0.25 * 1 + 0.25 * 9) / (1 - 0.75**2)),
    ):
        ones = jax.tree.map(jnp.ones_like, updates)
        found, state = scale.update(updates, state, fisher=ones)
        expected = updates["a"] / 2 / square**0.5
        chex.assert_trees_all_close(found["a"], expected, rtol=1e-6)
    assert int(state.steps) == 3


def test_the_scales_of_both_change_nothing():
    once = apply(scale_by_fisher(FISHER))
    for factor in (7.0, 1e-12):
        fisher = jax.tree.map(lambda x, c=factor: c * x, FISHER)
        chex.assert_trees_all_close(apply(scale_by_fisher(fisher)), once, rtol=1e-5)
    thrice = apply(scale_by_fisher(FISHER), jax.tree.map(lambda x: 3 * x, UPDATES))
    chex.assert_trees_all_close(thrice, once, rtol=1e-5)


def test_zero_fisher_and_zero_updates():
    nothing = jax.tree.map(jnp.zeros_like, FISHER)
    chex.assert_trees_all_close(
        apply(scale_by_fisher(nothing)),
        apply(scale_by_fisher(jax.tree.map(jnp.ones_like, FISHER))),
        rtol=1e-6,
    )
    factors = {"a": FISHER["a"], "b": FactoredFisher(jnp.zeros(1), jnp.zeros(2))}
    assert np.isfinite(apply(scale_by_fisher(factors))["b"]).all()
    updates = jax.tree.map(jnp.zeros_like, UPDATES)
    chex.assert_trees_all_equal(apply(scale_by_fisher(FISHER), updates), updates)


def test_held_or_as_an_extra_argument():
    held = apply(scale_by_fisher(FISHER))
    chex.assert_trees_all_close(
        apply(scale_by_fisher(), fisher=FISHER), held, rtol=1e-6
    )
    other = jax.tree.map(jnp.ones_like, FISHER)  # for a penalty in the same chain
    both = apply(scale_by_fisher(FISHER), fisher=other)
    chex.assert_trees_all_close(both, held, rtol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (2, 3, 1, 4)])
def test_factors_of_rank_one_are_exact(shape):
    rows = jnp.abs(normal(*shape[:-1], 1))
    columns = jnp.abs(normal(*shape[:-2], 1, shape[-1]))
    dense = rows * columns
    factors = FactoredFisher(dense.mean(-1), dense.mean(-2))
    updates = {"a": UPDATES["a"], "b": normal(*shape)}
    got = apply(scale_by_fisher({"a": FISHER["a"], "b": factors}), updates)
    expected = expected_of(updates, {"a": FISHER["a"], "b": dense})
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


def test_mean_of_factors_is_that_of_the_dense_leaf():
    dense = jnp.square(normal(6, 4))  # not of rank one
    factors = FactoredFisher(dense.mean(1), dense.mean(0))
    updates = {"a": UPDATES["a"], "b": jnp.zeros((6, 4))}
    got, expected = (
        apply(scale_by_fisher({"a": FISHER["a"], "b": f}), updates)["a"]
        for f in (factors, dense)
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


def test_inside_a_filter():
    inner = optax.chain(
        optax.scale_by_adam(), scale_by_fisher(), optax.scale_by_learning_rate(0.1)
    )
    optimizer = filter_by_momentum(inner, 0.25, score="update")
    params = jax.tree.map(jnp.ones_like, UPDATES)
    updates, state = optimizer.update(
        UPDATES, optimizer.init(params), params, fisher=FISHER
    )
    # Adam's first direction is a sign everywhere, so the least important entry leads.
    assert (updates["a"] != 0).tolist() == [True, False, False, False]
    assert int(optax.tree.get(state, "count")) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
@pytest.mark.parametrize("fisher_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_stay(dtype, fisher_dtype):
    updates = jax.tree.map(lambda x: x.astype(dtype), UPDATES)
    fisher = jax.tree.map(lambda x: x.astype(fisher_dtype), FISHER)
    scale = scale_by_fisher(fisher)
    state = scale.init(updates)
    update = jax.jit(scale.update)
    new, new_state = update(updates, update(updates, state)[1])
    chex.assert_trees_all_equal_dtypes(new, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    expected = expected_of(UPDATES, FISHER)
    real = jax.tree.map(lambda x: x.real.astype(jnp.float32), new)
    chex.assert_trees_all_close(real, expected, rtol=1e-2)


def test_float64():
    with jax.enable_x64(True):
        updates = jax.tree.map(lambda x: x.astype(jnp.float64), UPDATES)
        fisher = jax.tree.map(lambda x: x.astype(jnp.float64), FISHER)
        new = apply(scale_by_fisher(fisher), updates)
        assert new["a"].dtype == jnp.float64
        chex.assert_trees_all_close(new, expected_of(updates, fisher), rtol=1e-6)


def test_complex():
    updates = jnp.array([3 + 4j, 0, 0, 0], jnp.complex64)
    new = apply(scale_by_fisher(jnp.ones(4)), updates)
    np.testing.assert_allclose(new, [1.2 + 1.6j, 0, 0, 0], rtol=1e-6)


def test_scalars_empty_leaves_and_none():
    updates = {"s": jnp.float32(2.0), "e": jnp.zeros((0, 3)), "n": None}
    empty = FactoredFisher(jnp.zeros(0), jnp.zeros(3))
    for e in (jnp.zeros((0, 3)), empty):
        fisher = {"s": jnp.float32(1.0), "e": e, "n": None}
        new = apply(scale_by_fisher(fisher), updates)
        assert new["n"] is None and new["e"].shape == (0, 3)
        np.testing.assert_allclose(new["s"], 1.0, rtol=1e-6)
    assert apply(scale_by_fisher({}), {}) == {}


@pytest.mark.parametrize("nested", [False, True])
def test_masked(nested):
    """The Fisher information may hold leaves that are masked."""
    updates, fisher = UPDATES, {**FISHER, "b": FactoredFisher(jnp.ones(1), jnp.ones(2))}
    if nested:  # the mask is a prefix then
        updates, fisher = ({**t, "b": {"c": t["b"]}} for t in (updates, fisher))
    mask = {"a": True, "b": False}
    new = apply(optax.masked(scale_by_fisher(), mask), updates, fisher=fisher)
    chex.assert_trees_all_equal(new["b"], updates["b"])
    only = {"a": UPDATES["a"]}
    expected = expected_of(only, {"a": FISHER["a"]})
    chex.assert_trees_all_close({"a": new["a"]}, expected, rtol=1e-5)


def test_injected_hyperparameters():
    scale = optax.inject_hyperparams(scale_by_fisher)(
        damping=optax.linear_schedule(0.5, 0.1, 1)
    )
    state = scale.init(UPDATES)
    update = jax.jit(scale.update)
    state.hyperparams["decay"] = jnp.float32(0.0)
    for _ in range(3):  # the damping falls, and the mean square follows a step later
        found, state = update(UPDATES, state, UPDATES, fisher=FISHER)
    chex.assert_trees_all_close(found, expected_of(UPDATES, FISHER, 0.1), rtol=1e-5)
    static = optax.inject_hyperparams(scale_by_fisher, static_args="fisher")
    array = static(FISHER["a"])
    assert "fisher" not in array.init(UPDATES["a"]).hyperparams


def test_map_params_and_no_recompilation():
    inner = optax.chain(optax.scale_by_adam(), scale_by_fisher(FISHER))
    state = inner.init(UPDATES)
    mapped = optax.tree.map_params(inner, lambda x: x + 1, state)
    chex.assert_trees_all_equal(mapped[1], state[1])
    compiled = []

    @jax.jit
    def step(updates, state):
        compiled.append(None)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
            return inner.update(updates, state)

    for _ in range(3):
        _, state = step(UPDATES, state)
    assert len(compiled) == 1


def test_scan_and_vmap():
    scale = scale_by_fisher(FISHER, decay=0.5)
    steps = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), UPDATES)
    turn = lambda state, updates: scale.update(updates, state)[::-1]
    last, scanned = jax.lax.scan(turn, scale.init(UPDATES), steps)
    state = scale.init(UPDATES)
    for i in range(3):
        updates, state = scale.update(jax.tree.map(lambda x, i=i: x[i], steps), state)
    chex.assert_trees_all_close(last, state, rtol=1e-6)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[2], scanned), updates, rtol=1e-6
    )
    alone = apply(scale)

    def second(updates):
        _, state = scale.update(updates, scale.init(updates))
        return scale.update(updates, state)[0]

    batched = jax.vmap(second)(steps)
    for i in range(3):  # the scale of an update changes nothing
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], batched), alone, rtol=1e-5
        )


def on_mesh():
    updates = {"w": normal(8, 16), "b": normal(16), "s": normal(4, 8, 16)}
    dense = jax.tree.map(jnp.square, {k: normal(*x.shape) for k, x in updates.items()})
    specs = {"w": P("x", "y"), "b": P("y"), "s": P(None, "y", "x")}
    factored = {
        k: FactoredFisher(x.mean(-1), x.mean(-2)) if x.ndim > 1 else x
        for k, x in dense.items()
    }
    factor_specs = {
        "w": FactoredFisher(P("x"), P("y")),
        "b": P("y"),
        "s": FactoredFisher(P(None, "y"), P(None, "x")),
    }
    return (
        updates,
        specs,
        {"dense": (dense, specs), "factored": (factored, factor_specs)},
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("kind", ["dense", "factored"])
@pytest.mark.parametrize("replicated", [False, True])
def test_on_a_mesh(axis_type, kind, replicated):
    updates, specs, kinds = on_mesh()
    fisher, fisher_specs = kinds[kind]
    expected = apply(scale_by_fisher(), updates, fisher=fisher)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    with jax.set_mesh(mesh):
        place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        if replicated:
            fisher_specs = jax.tree.map(lambda x: P(), fisher)
        sharded = jax.tree.map(place, updates, specs)
        new = apply(
            scale_by_fisher(),
            sharded,
            fisher=jax.tree.map(place, fisher, fisher_specs),
        )
        if axis_type == AxisType.Explicit:
            assert all(jax.typeof(new[k]).sharding.spec == specs[k] for k in specs)
        held = apply(scale_by_fisher(fisher), sharded)  # on no mesh itself
    chex.assert_trees_all_close(new, expected, rtol=1e-5)
    chex.assert_trees_all_close(held, expected, rtol=1e-5)


def test_shard_map_with_automatic_axes():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    updates, fisher = normal(8, 16), jnp.square(normal(8, 16))
    scale = scale_by_fisher()

    def shard(u, f):
        _, state = scale.update(u, scale.init(u), fisher=f)
        return scale.update(u, state, fisher=f)[0]

    mapped = jax.shard_map(
        shard, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names={"x"}
    )
    parts = zip(np.split(updates, 4), np.split(fisher, 4), strict=True)
    expected = np.concatenate([expected_of({"a": u}, {"a": f})["a"] for u, f in parts])
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("x", "y"))
        got = jax.jit(mapped)(*(jax.device_put(x, sharding) for x in (updates, fisher)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("damping", [0.0, -1.0, np.nan, np.inf]),
        ("decay", [-0.1, 1.0, np.nan]),
    ],
)
def test_bad_numbers(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be a number"):
            scale_by_fisher(**{name: value})
    for value in ("1", True, jnp.ones(2)):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            scale_by_fisher(**{name: value})


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        (None, "scale_by_fisher needs fisher"),
        ({"a": FISHER["a"]}, "fisher must have .* got no leaf for b"),
        ({**FISHER, "c": FISHER["a"]}, r"got \(4,\) for c"),
        ({**FISHER, "b": jnp.ones((2, 1))}, r"got \(2, 1\) for b"),
        (
            {**FISHER, "b": FactoredFisher(jnp.ones(2), jnp.ones(1))},
            r"got \(2, 1\) for b, which there is \(1, 2\)",
        ),
        (
            {**FISHER, "b": FactoredFisher(jnp.ones((3, 1)), jnp.ones(2))},
            r"fisher must have rows .* got \[3, 1\] and \[2\] for b",
        ),
    ],
)
def test_bad_fisher(fisher, message):
    with pytest.raises(ValueError, match=message):
        apply(scale_by_fisher(), fisher=fisher)
    with pytest.raises(ValueError, match=message):
        apply(scale_by_fisher(fisher))
