"""What Optax asks of every contributed optimizer, after its own common tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mofo_jax import mofo

pytestmark = pytest.mark.thorough

KWARGS = {
    "default": {"learning_rate": 1e-2},
    "more": {"learning_rate": 1e-2, "alpha": 0.4},
    "decay": {"learning_rate": 1e-2, "weight_decay": 1e-6, "mu_dtype": None},
}
OPTIMIZERS = {name: mofo(**kwargs) for name, kwargs in KWARGS.items()}
OPTIMIZERS["mechanize"] = optax.contrib.mechanize(mofo(1.0), weight_decay=0.0)

START = {
    "parabola": [-1.0, 10.0, 1.0],
    "rosenbrock": [0.0, 0.0],
    "matrix": [[0.0, 0.0], [0.0, 0.0]],
    "mixed": ([0.0, 0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]]),
}
END = {
    "parabola": [1.0, -1.0, 1.0],
    "rosenbrock": [1.0, 1.0],
    "matrix": [[3.0, -2.0], [1.0, 4.0]],
    "mixed": ([1.0, -1.0, 2.0], [[1.0, 0.0], [-1.0, 1.0]]),
}


# Optax mixes dtypes and ranks, which this project's tests refuse elsewhere.
@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def arrays(tree, dtype=jnp.float32):
    is_array = lambda x: isinstance(x, list)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree, is_leaf=is_array)


def loss(params, names):
    def square(name):
        differences = jax.tree.map(
            lambda p, end: jnp.sum((p - end) ** 2),
            params[name],
            arrays(END[name], jax.tree.leaves(params[name])[0].dtype),
        )
        return optax.tree.sum(differences)

    def rosenbrock(x):
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    parts = [rosenbrock(params[n]) if n == "rosenbrock" else square(n) for n in names]
    return sum(parts)


def make_step(optimizer, **extra):
    def step(params, state):
        gradients = jax.grad(loss)(params, list(params))
        updates, state = optimizer.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


# The leaves of one program do not interact, but for mechanize's.
@pytest.mark.parametrize(
    ("name", "targets"),
    [(name, tuple(START)) for name in KWARGS]
    + [("mechanize", (target,)) for target in START],
)
def test_convergence(name, targets):
    optimizer = OPTIMIZERS[name]
    step = make_step(optimizer)
    params = {target: arrays(START[target]) for target in targets}
    # Mapped parameters are still a state.
    state = optax.tree.map_params(optimizer, lambda x: x, optimizer.init(params))
    run = jax.jit(
        lambda carry: jax.lax.scan(
            lambda carry, _: (step(*carry), None), carry, length=30_000
        )[0]
    )
    params, _ = run((params, state))
    for target in targets:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-2, atol=3e-2),
            params[target],
            arrays(END[target]),
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unexpected_arguments_and_one_compilation(name):
    traces = []
    step = make_step(OPTIMIZERS[name], an_argument_of_another_optimizer=1)

    @jax.jit
    def counted(params, state):
        traces.append(None)
        return step(params, state)

    params = {"rosenbrock": arrays(START["rosenbrock"])}
    state = OPTIMIZERS[name].init(params)
    for _ in range(3):
        params, state = counted(params, state)
    assert len(traces) == 1


@pytest.mark.parametrize("name", KWARGS)
def test_injected_hyperparameters_change_nothing(name):
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    gradients = jax.tree.map(jnp.negative, params)

    def updated(optimizer):
        state = optimizer.init(params)
        return jax.jit(optimizer.update)(gradients, state, params)

    updates, state = updated(OPTIMIZERS[name])
    injected, outer = updated(optax.inject_hyperparams(mofo)(**KWARGS[name]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        (injected, outer.inner_state),
        (updates, state),
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_shapes_and_dtypes_are_stable(name, dtype):
    """Of the updates, those of the parameters; of the state, those of init."""
    with jax.enable_x64(dtype == "float64"):
        optimizer = mofo(1.0) if name == "mechanize" else OPTIMIZERS[name]
        params = {"parabola": arrays(START["parabola"], dtype)}

        def step(params, state, skip):
            gradients = jax.grad(loss)(params, list(params))
            return jax.lax.cond(
                skip,
                lambda: (params, state),
                lambda: optimizer.update(gradients, state, params),
            )

        state = optimizer.init(params)
        result = jax.eval_shape(step, params, state, True)
        types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert types(result) == types((params, state))


@pytest.mark.parametrize("name", KWARGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_accumulated(name, dtype):
    optimizer = optax.MultiSteps(OPTIMIZERS[name], every_k_schedule=4)
    params = jnp.array([1.0, 2.0], dtype)
    updates, _ = jax.jit(optimizer.update)(2 * params, optimizer.init(params), params)
    assert updates.dtype == params.dtype
    assert (updates == 0).all()


def test_a_constant_schedule_is_a_number():
    params = {"parabola": arrays(START["parabola"])}

    def trained(learning_rate):
        optimizer = mofo(learning_rate)
        step, state = jax.jit(make_step(optimizer)), optimizer.init(params)
        new = params
        for _ in range(10):
            new, state = step(new, state)
        return new["parabola"]

    expected = trained(1e-3)
    np.testing.assert_allclose(trained(optax.constant_schedule(1e-3)), expected)
    assert (expected != params["parabola"]).any()
