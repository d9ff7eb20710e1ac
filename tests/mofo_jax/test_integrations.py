"""MoFO in the places where people keep an Optax optimizer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training import train_state

from mofo_jax import all_but_norms_and_biases, filter_by_momentum, mofo

pytestmark = pytest.mark.thorough

X = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
Y = np.tanh(X @ np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32))
PARAMS = {
    "w": jnp.asarray(np.random.default_rng(2).normal(size=(6, 4)), jnp.float32),
    "b": jnp.zeros(4),
}


def loss(params, x=X, y=Y):
    return jnp.mean((x @ params["w"] + params["b"][None] - y) ** 2)


def make_step(optimizer):
    @jax.jit
    def step(params, state, x=X, y=Y):
        value, gradients = jax.value_and_grad(loss)(params, x, y)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def train(optimizer, steps=60, params=PARAMS):
    step, state = make_step(optimizer), optimizer.init(params)
    for _ in range(steps):
        params, state, _ = step(params, state)
    return params, state


def moved(new, old=PARAMS):
    return jax.tree.map(lambda a, b: int((a != b).sum()), new, old)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_plain_loop_and_chain():
    start = loss(PARAMS)
    params, _ = train(mofo(0.05, alpha=0.1))
    assert loss(params) < 0.5 * start
    chained, _ = train(optax.chain(mofo(alpha=0.1), optax.scale_by_learning_rate(0.05)))
    assert_same(chained, params)
    clipped = optax.chain(optax.clip_by_global_norm(0.1), mofo(0.05, alpha=0.1))
    assert loss(train(clipped)[0]) < 0.5 * start


@jax.numpy_dtype_promotion("standard")  # MultiSteps divides float by int
def test_multi_steps():
    every = optax.MultiSteps(mofo(0.05, alpha=0.25), every_k_schedule=2)
    step, state, params = make_step(every), every.init(PARAMS), PARAMS
    params, state, _ = step(params, state, X[:32], Y[:32])
    assert moved(params) == {"w": 0, "b": 0}
    params, state, _ = step(params, state, X[32:], Y[32:])
    assert moved(params) == {"w": 6, "b": 1}
    whole, _ = train(mofo(0.05, alpha=0.25), 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, whole
    )


def test_inject_hyperparams():
    optimizer = optax.inject_hyperparams(mofo)(
        learning_rate=0.05, alpha=optax.linear_schedule(0.25, 0.5, 1)
    )
    step, state = make_step(optimizer), optimizer.init(PARAMS)
    first, state, _ = step(PARAMS, state)
    assert moved(first) == {"w": 6, "b": 1}
    second, state, _ = step(first, state)
    assert moved(second, first) == {"w": 12, "b": 2}
    assert state.hyperparams["alpha"] == 0.5
    static = optax.inject_hyperparams(mofo, static_args=("filter_mask", "block_axes"))
    optimizer = static(0.05, 0.5, filter_mask=all_but_norms_and_biases, block_axes=0)
    step, state = make_step(optimizer), optimizer.init(PARAMS)
    assert moved(step(PARAMS, state)[0])["w"] == 12


def test_masked_and_partition():
    only_w = optax.masked(mofo(0.05, alpha=0.25), {"w": True, "b": False})
    state = only_w.init(PARAMS)
    gradients = jax.grad(loss)(PARAMS)
    updates, _ = jax.jit(only_w.update)(gradients, state, PARAMS)
    assert (updates["w"] != 0).sum() == 6
    np.testing.assert_array_equal(updates["b"], gradients["b"])
    parts = {"mofo": mofo(0.05, alpha=0.25), "frozen": optax.set_to_zero()}
    split = optax.partition(parts, {"w": "mofo", "b": "frozen"})
    new, state = train(split, 1)
    assert moved(new) == {"w": 6, "b": 0}
    optax.tree.map_params(split, lambda x: x, state)


def test_apply_if_finite():
    optimizer = optax.apply_if_finite(mofo(0.05, alpha=0.25), 3)
    step, state = make_step(optimizer), optimizer.init(PARAMS)
    params, state, _ = step(PARAMS, state, X, Y + np.float32(np.nan))
    assert_same(params, PARAMS)
    params, state, _ = step(params, state)
    assert moved(params) == {"w": 6, "b": 1}
    assert np.isfinite(jax.tree.leaves(optax.tree.get(state, "mu"))[0]).all()


@pytest.mark.parametrize(
    ("guard", "moves"),
    [
        (lambda inner: inner, False),
        (lambda inner: optax.apply_if_finite(inner, 3), False),
        (lambda inner: optax.chain(optax.zero_nans(), inner), False),
        (lambda inner: optax.chain(optax.clip_by_global_norm(1.0), inner), True),
        (lambda inner: optax.chain(optax.clip(1.0), inner), True),
    ],
    ids=["none", "apply_if_finite", "zero_nans", "clip_by_global_norm", "clip"],
)
def test_after_a_large_gradient(guard, moves):
    """Its square is infinite, and so is Adam's second moment, if it gets there."""
    optimizer = guard(mofo(0.05, alpha=1.0))
    params = {"w": jnp.zeros(3), "b": jnp.zeros(2)}
    ones = jax.tree.map(jnp.ones_like, params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    large = ones | {"w": ones["w"].at[1].set(3e38)}
    for gradients in (ones, large, ones, ones):
        before = params
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    changed = jax.tree.map(lambda a, b: (a != b).tolist(), params, before)
    assert changed == {"w": [True, moves, True], "b": [True, True]}
    assert all(np.isfinite(x).all() for x in params.values())


@jax.numpy_dtype_promotion("standard")  # reduce_on_plateau multiplies float by int
def test_reduce_on_plateau():
    optimizer = optax.chain(mofo(0.05, 0.25), optax.contrib.reduce_on_plateau())
    value, gradients = jax.value_and_grad(loss)(PARAMS)
    updates, _ = optimizer.update(
        gradients, optimizer.init(PARAMS), PARAMS, value=value
    )
    assert moved(optax.apply_updates(PARAMS, updates)) == {"w": 6, "b": 1}


def test_schedule_free():
    # Its interpolation is the momentum; so the filter goes by gradients.
    optimizer = optax.contrib.schedule_free(mofo(0.05, 0.25, b1=0.0), 0.05)
    params, state = train(optimizer, 1)
    assert moved(state.z) == {"w": 6, "b": 1}
    params, state = train(optimizer, 100)
    averaged = optax.contrib.schedule_free_eval_params(state, params)
    assert loss(averaged) < 0.5 * loss(PARAMS)


@jax.numpy_dtype_promotion("standard")  # sam multiplies float by bool
def test_sharpness_aware_minimization():
    # Every other step is one to where the loss is large, and is taken back by the next.
    optimizer = optax.contrib.sam(mofo(0.05, 0.25), optax.sgd(0.01))
    assert moved(train(optimizer, 2)[0]) == {"w": 6, "b": 1}
    assert loss(train(optimizer, 100)[0]) < 0.5 * loss(PARAMS)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(jnp.tanh(self.first(x))))


def test_nnx_optimizer():
    model = NnxModel(nnx.Rngs(0))
    before = nnx.state(model, nnx.Param)
    before = jax.tree.map(jnp.copy, before)
    optimizer = nnx.Optimizer(
        model,
        mofo(0.05, alpha=0.25, filter_mask=all_but_norms_and_biases),
        wrt=nnx.Param,
    )

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(
            lambda model: jnp.mean((model(X) - Y) ** 2)
        )(model)
        optimizer.update(model, gradients)
        return value

    first = step(model, optimizer)
    after = nnx.state(model, nnx.Param)
    changed = jax.tree.map(lambda a, b: int((a != b).sum()), after, before)
    changed = nnx.to_pure_dict(changed)
    assert changed["first"] == {"kernel": 12, "bias": 8}
    assert changed["norm"] == {"scale": 8, "bias": 8}
    for _ in range(50):
        last = step(model, optimizer)
    assert last < 0.3 * first


def test_linen_train_state():
    model = linen.Dense(4)
    params = model.init(jax.random.key(0), X)["params"]
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=mofo(0.05, alpha=0.25)
    )

    @jax.jit
    def step(state):
        def objective(params):
            return jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)

        value, gradients = jax.value_and_grad(objective)(state.params)
        return state.apply_gradients(grads=gradients), value

    new, first = step(state)
    assert moved(new.params, params) == {"kernel": 6, "bias": 1}
    for _ in range(60):
        new, last = step(new)
    assert last < 0.5 * first


def test_equinox():
    model = eqx.nn.MLP(6, 4, 8, 1, key=jax.random.key(0))
    optimizer = mofo(0.05, alpha=0.25, filter_mask=all_but_norms_and_biases)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        def objective(model):
            return jnp.mean((jax.vmap(model)(X) - Y) ** 2)

        value, gradients = eqx.filter_value_and_grad(objective)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimizer.update(gradients, state, params)
        return eqx.apply_updates(model, updates), state, value

    new, state, first = step(model, state)
    assert (new.layers[0].weight != model.layers[0].weight).sum() == 12
    assert (new.layers[0].bias != model.layers[0].bias).all()
    for _ in range(60):
        new, state, last = step(new, state)
    assert last < 0.5 * first


@pytest.mark.parametrize(
    "optimizer",
    [
        mofo(optax.constant_schedule(0.05), alpha=lambda step: 0.2 + 0.01 * step),
        filter_by_momentum(optax.sgd(0.05), 0.2, score="random"),
    ],
    ids=["mofo", "random"],
)
def test_orbax_continues_bit_for_bit(optimizer, tmp_path):
    step = make_step(optimizer)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(5):
        params, state, _ = step(params, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "at_5", {"params": params, "state": state})
    for _ in range(5):
        params, state, _ = step(params, state)

    like = {"params": PARAMS, "state": optimizer.init(PARAMS)}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            tmp_path / "at_5", jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        )
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    new_params, new_state = restored["params"], restored["state"]
    for _ in range(5):
        new_params, new_state, _ = step(new_params, new_state)
    assert_same((new_params, new_state), (params, state))


def test_vmap_over_seeds_and_scan_over_steps():
    optimizer = mofo(0.05, alpha=0.25)

    def run(seed):
        noise = jax.random.normal(jax.random.key(seed), (6, 4))
        params = {"w": PARAMS["w"] + noise, "b": PARAMS["b"]}

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, optimizer.init(params))
        return jax.lax.scan(step, carry, length=20)[0][0]

    together = jax.jit(jax.vmap(run))(jnp.arange(3))
    for seed in range(3):
        alone = jax.jit(run)(seed)
        jax.tree.map(
            lambda a, b, seed=seed: np.testing.assert_allclose(
                a[seed], b, rtol=2e-4, atol=1e-5
            ),
            together,
            alone,
        )
