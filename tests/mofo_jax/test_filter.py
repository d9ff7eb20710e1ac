"""The filter keeps what it should, of any transformation, on any tree."""

import collections

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from mofo_jax import (
    all_but_norms_and_biases,
    filter_by_momentum,
    mofo,
    top_fraction_mask,
)

WITH_MOMENTUM = {
    "adam": (optax.adam(0.1), "mu"),
    "nadam": (optax.nadam(0.1), "mu"),
    "lion": (optax.lion(0.1), "mu"),
    "adabelief": (optax.adabelief(0.1), "mu"),
    "amsgrad": (optax.amsgrad(0.1), "mu"),
    "sgd": (optax.sgd(0.1, momentum=0.9), "trace"),
    "rmsprop": (optax.rmsprop(0.1, momentum=0.9), "trace"),
    "adafactor": (optax.adafactor(0.1, momentum=0.9), "ema"),
    "adan": (optax.adan(0.1), "m"),
}


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (6, 8), "stack": (3, 4, 5), "b": (7,), "s": ()}
    return {n: jnp.float32(scale * rng.normal(size=s)) for n, s in shapes.items()}


def run(optimizer, steps=3, params=None):
    """Yields updates, gradients and state of every step."""
    params = tree(0) if params is None else params
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        gradients = tree(step + 1)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        yield updates, gradients, state


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_filters_every_optimizer_with_momentum(name):
    inner, field = WITH_MOMENTUM[name]
    params = tree(0)
    inner_state = inner.init(params)
    optimizer = filter_by_momentum(inner, alpha=0.3)
    state = optimizer.init(params)
    for step in range(3):
        gradients = tree(step + 1)
        with jax.numpy_dtype_promotion("standard"):
            dense, inner_state = jax.jit(inner.update)(gradients, inner_state, params)
        updates, state = jax.jit(optimizer.update)(gradients, state, params)
        moment = optax.tree.get(inner_state, field)
        for leaf in params:
            mask = top_fraction_mask(moment[leaf], 0.3, method="top_k")
            expected = np.where(mask, dense[leaf], 0)
            np.testing.assert_allclose(updates[leaf], expected, rtol=1e-6, atol=1e-9)
            np.testing.assert_array_equal(np.asarray(updates[leaf]) == 0, ~mask)
        params = optax.apply_updates(params, updates)


def test_alpha_one_is_the_inner_optimizer_bit_for_bit():
    for alpha in (1.0, 1, jnp.float32(1), lambda step: jnp.float32(1)):
        pairs = zip(
            run(filter_by_momentum(optax.adam(0.1), alpha)),
            run(filter_by_momentum(optax.adam(0.1), filter_mask=False)),
            strict=True,
        )
        for (filtered, _, _), (dense, _, _) in pairs:
            jax.tree.map(np.testing.assert_array_equal, filtered, dense)


@pytest.mark.parametrize("score", ["gradient", "update", "function"])
def test_scores(score):
    optimizer = filter_by_momentum(
        optax.scale_by_adam(),
        0.25,
        score=(lambda g, u, s, p: jax.tree.map(jnp.multiply, g, p))
        if score == "function"
        else score,
    )
    params, state = tree(0), optimizer.init(tree(0))
    dense = optax.scale_by_adam()
    dense_state = dense.init(params)
    for step in range(3):
        g = tree(step + 1)
        updates, state = optimizer.update(g, state, params)
        with jax.numpy_dtype_promotion("standard"):
            full, dense_state = dense.update(g, dense_state)
        for leaf in params:
            ranked = {
                "gradient": g[leaf],
                "update": full[leaf],
                "function": g[leaf] * params[leaf],
            }[score]
            mask = top_fraction_mask(ranked, 0.25)
            np.testing.assert_array_equal(updates[leaf], jnp.where(mask, full[leaf], 0))


def test_random_score():
    def moved(seed):
        optimizer = filter_by_momentum(optax.sgd(1.0), 0.25, score="random", seed=seed)
        steps = run(optimizer, 40)
        return np.array([np.asarray(updates["w"]) != 0 for updates, _, _ in steps])

    first = moved(0)
    assert (first.sum((1, 2)) == 12).all()
    np.testing.assert_array_equal(first, moved(0))
    assert (first != moved(1)).any()
    share = first.mean(0)  # of 40 steps with chance 1/4: five standard deviations
    assert (abs(share - 0.25) < 0.35).all() and share.std() > 0.02
    assert len(np.unique(first.reshape(40, -1), axis=0)) == 40


@pytest.mark.parametrize(
    "block_axes",
    [
        {"w": 0, "stack": (0, -1), "b": None, "s": None},
        {"w": np.int64(0), "stack": (0, 2), "b": (), "s": None},
        lambda params: {"w": 0, "stack": (0, 2), "b": None, "s": None},
    ],
)
def test_block_axes(block_axes):
    for updates, gradients, _ in run(
        filter_by_momentum(optax.sgd(1.0), 0.5, score="gradient", block_axes=block_axes)
    ):
        assert ((updates["w"] != 0).sum(1) == 4).all()
        assert ((updates["stack"] != 0).sum(1) == 2).all()
        assert (updates["b"] != 0).sum() == 3
        mask = top_fraction_mask(gradients["w"], 0.5, block_axes=0)
        np.testing.assert_array_equal(updates["w"] != 0, mask)


def test_alpha_schedule_under_strict_promotion():
    # Optax's cosine mixes int32 and float32.
    schedule = optax.cosine_decay_schedule(0.5, 4)
    sizes = [
        int((updates["w"] != 0).sum())
        for updates, _, _ in run(filter_by_momentum(optax.adam(0.1), schedule), 3)
    ]
    assert sizes[:2] == [24, 20] and sizes[2] in (11, 12)  # 0.25, rounded


def test_one_block_axis_for_all_leaves():
    optimizer = filter_by_momentum(
        optax.sgd(1.0), 0.5, score="gradient", block_axes=(0,)
    )
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 6))}
    updates, _ = optimizer.update(params, optimizer.init(params))
    assert jax.tree.map(lambda u: (u != 0).sum(1).tolist(), updates) == {
        "a": [2, 2, 2],
        "b": [3, 3],
    }


@pytest.mark.parametrize(
    "filter_mask",
    [
        {"w": True, "stack": False, "b": np.bool_(False), "s": True},
        lambda params: jax.tree.map(lambda p: p.ndim not in (1, 3), params),
    ],
)
def test_filter_mask(filter_mask):
    for updates, _, _ in run(
        filter_by_momentum(optax.adam(0.1), 0.1, filter_mask=filter_mask)
    ):
        assert (updates["w"] != 0).sum() == 4
        assert (updates["stack"] != 0).all() and (updates["b"] != 0).all()


def test_alpha_schedule_counts_steps_from_zero():
    schedule = optax.linear_schedule(0.25, 0.75, 2)
    sizes = [
        int((updates["w"] != 0).sum())
        for updates, _, _ in run(filter_by_momentum(optax.adam(0.1), schedule), 4)
    ]
    assert sizes == [12, 24, 36, 36]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_an_entry_not_selected_keeps_its_bits(dtype):
    dtype = jnp.dtype(dtype)
    real = np.array([-0.0, 0.0, 1.5, -2.0, np.inf, -np.inf, 3.0, 4.0, 5.0, 6.0])
    params = jnp.asarray(real.astype(dtype))
    gradients = jnp.zeros(10, dtype).at[9].set(1).at[8].set(0.5)
    before = np.asarray(params).tobytes()
    for optimizer in (
        mofo(0.1, alpha=0.2),
        mofo(lambda step: 0.1, alpha=0.2),
        optax.chain(mofo(alpha=0.2), optax.scale_by_learning_rate(0.1)),
        filter_by_momentum(optax.adam(0.1), 0.2),
        filter_by_momentum(optax.sgd(0.1), 0.2, score="gradient"),
        mofo(0.1, alpha=0.2, decay_selected_only=True),
    ):
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        assert updates.dtype == dtype
        after = np.asarray(optax.apply_updates(params, updates)).tobytes()
        unmoved = 8 * dtype.itemsize
        assert after[:unmoved] == before[:unmoved]
        assert after[unmoved:] != before[unmoved:]


def test_leaves_of_every_kind():
    params = {
        "scalar": jnp.float32(1),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "masked": optax.MaskedNode(),
        "half": jnp.ones(10, jnp.float16),
        "brain": jnp.ones((2, 5), jnp.bfloat16),
        "complex": jnp.ones(10, "complex64"),
    }
    optimizer = mofo(0.1, alpha=0.3)
    state = optimizer.init(params)
    updates, new_state = jax.jit(optimizer.update)(params, state, params)
    kind = lambda x: (jnp.shape(x), jnp.asarray(x).dtype)
    assert jax.tree.map(kind, updates) == jax.tree.map(kind, params)
    assert jax.tree.map(kind, new_state) == jax.tree.map(kind, state)
    count = {n: int((u != 0).sum()) for n, u in updates.items() if n[0] in "shbc"}
    assert count == {"scalar": 1, "half": 3, "brain": 3, "complex": 3}


def test_float64():
    with jax.enable_x64(True):
        params = jnp.arange(1.0, 21.0)
        optimizer = mofo(0.1, alpha=0.1)
        updates, state = optimizer.update(params, optimizer.init(params), params)
        assert updates.dtype == optax.tree.get(state, "mu").dtype == jnp.float64
        assert (updates != 0).sum() == 2


@pytest.mark.parametrize("mu_dtype", ["bfloat16", "float16"])
def test_moments_of_low_precision_tie_to_the_lowest_index(mu_dtype):
    params = jnp.zeros(100)
    gradients = 1 + 1e-4 * jnp.arange(100.0)  # one value after rounding
    optimizer = mofo(0.1, alpha=0.1, mu_dtype=mu_dtype)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    moment = optax.tree.get(state, "mu")
    assert moment.dtype == mu_dtype
    mask = top_fraction_mask(moment, 0.1, method="top_k")
    np.testing.assert_array_equal(updates != 0, mask)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_gradient_selects_as_many_entries(bad):
    params = jnp.ones((5, 20))
    gradients = jnp.ones((5, 20)).at[1, :5].set(bad).at[3, 0].set(np.nan)
    optimizer = mofo(0.1, alpha=0.04)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    changed = (updates != 0) | jnp.isnan(updates)
    assert changed.sum() == 4
    assert changed[3, 0] or np.isnan(bad)  # NaN ranks highest, of several the first
    assert updates.shape == params.shape and updates.dtype == params.dtype
    assert jnp.isnan(optax.tree.get(state, "mu")[3, 0])  # as in Adam


def test_inner_states_of_several_parts():
    params = tree(0)
    labels = {"w": "adam", "stack": "sgd", "b": "sgd", "s": "adam"}
    parts = {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1, momentum=0.9)}
    same = filter_by_momentum(
        optax.partition({"adam": optax.adam(0.1), "sgd": optax.lion(0.1)}, labels), 0.5
    )
    for updates, _, _ in run(same):
        assert (updates["w"] != 0).sum() == 24 and (updates["stack"] != 0).sum() == 30
    # Moments of two names are not one first moment.
    with pytest.raises(ValueError, match="0 first moments 'mu' for parameter b"):
        filter_by_momentum(optax.partition(parts, labels)).init(params)
    for updates, _, _ in run(filter_by_momentum(optax.contrib.muon(0.1), 0.5)):
        assert (updates["w"] != 0).sum() == 24 and (updates["b"] != 0).sum() == 3


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.ln_f = nnx.LayerNorm(4, rngs=rngs)
        self.input_norm = nnx.RMSNorm(4, rngs=rngs)
        self.proj = nnx.Linear(4, 4, rngs=rngs)


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.LayerNorm()(linen.Dense(3)(x))


def filtered_names(params):
    mask = all_but_norms_and_biases(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, filtered in jax.tree_util.tree_leaves_with_path(mask)
        if filtered
    }


def test_containers_of_axes_and_masks():
    """Lists and named tuples are pytrees, and a callable module is no function."""
    params = [jnp.ones((3, 4)), jnp.ones((3, 4))]
    pair = collections.namedtuple("pair", "w b")
    for wrap in (lambda leaves: leaves, lambda leaves: pair(*leaves)):
        optimizer = mofo(0.1, alpha=0.1, block_axes=wrap([0, 1]))
        updates, _ = optimizer.update(wrap(params), optimizer.init(wrap(params)))
        assert [int((u != 0).sum()) for u in updates] == [3, 4]
    key = jax.random.key(0)
    module = eqx.filter(eqx.nn.MLP(2, 3, 4, 1, key=key), eqx.is_inexact_array)
    mask = jax.tree.map(lambda p: p.ndim > 1, module)
    optimizer = mofo(0.1, alpha=0.1, filter_mask=mask)
    updates, _ = optimizer.update(module, optimizer.init(module), module)
    assert (updates.layers[0].weight != 0).sum() == 1
    assert (updates.layers[0].bias != 0).all()


def test_the_predicate_needs_names():
    injected = optax.inject_hyperparams(mofo)(0.1, filter_mask=all_but_norms_and_biases)
    with pytest.raises(ValueError, match=r"named parameters, .* static_args"):
        injected.init(PARAMS)


@pytest.mark.parametrize("kind", ["gradients", "rate", "weak", "injected"])
def test_dtypes_stay_those_of_the_parameters(kind):
    params = {"w": jnp.ones((3, 10), jnp.bfloat16), "b": jnp.ones(4)}
    gradients = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    optimizer = mofo(jnp.float32(0.1) if kind == "rate" else 0.1)
    if kind == "weak":
        params = gradients = jax.tree.map(lambda p: jnp.full(p.shape, 1.0), params)
    if kind == "injected":
        optimizer = optax.inject_hyperparams(mofo)(0.1)
    describe = lambda tree: jax.tree.map(jax.typeof, tree)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for _ in range(3):
            updates, new_state = update(gradients, state, params)
            assert describe(new_state) == describe(state)
            assert optax.tree.dtype(updates["w"]) == params["w"].dtype
            assert optax.tree.dtype(updates["b"]) == params["b"].dtype
            state = new_state
    assert update._cache_size() == 1


def test_names_of_norms_and_biases():
    assert filtered_names(nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)) == {
        "proj/kernel/value"
    }
    variables = LinenModel().init(jax.random.key(0), jnp.ones((1, 2)))
    assert filtered_names(variables) == {"params/Dense_0/kernel"}
    mlp = eqx.filter(eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)), eqx.is_array)
    assert filtered_names(mlp) == {"layers/0/weight", "layers/1/weight"}
    hugging_face = dict.fromkeys(
        [
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.q_proj.bias",
            "model.norm.weight",
            "model.layers.0.input_layernorm.weight",
            "lm_head.weight",
            "transformer.h.0.ln_1.weight",
            "transformer.ln_f.weight",
            "transformer.h.0.mlp.c_fc.weight",
            "encoder.final_ln.weight",
            "vision.vlnet.weight",
        ],
        0.0,
    )
    assert filtered_names(hugging_face) == {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "lm_head.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "vision.vlnet.weight",
    }


PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: filter_by_momentum(optax.sgd(0.1)),
            ValueError,
            "inner must keep a first moment .* none of the fields mu, trace, ema, m",
        ),
        (
            lambda: filter_by_momentum(optax.adam(0.1), score="size"),
            ValueError,
            'score must be one of "momentum", "gradient", .* got \'size\'',
        ),
        (
            lambda: filter_by_momentum(optax.adam(0.1), method="sort"),
            ValueError,
            "method must be",
        ),
        (
            lambda: filter_by_momentum(0.1),
            TypeError,
            "inner must be a gradient transformation, got 0.1",
        ),
        (lambda: filter_by_momentum(optax.adam(0.1), "0.1"), TypeError, "alpha must"),
        (
            lambda: mofo(block_axes=2),
            ValueError,
            r"block_axes 2 out of range for parameter b of shape \(3,\): .* -1 to 0",
        ),
        (
            lambda: mofo(block_axes={"w": 0}),
            ValueError,
            "(?s)block_axes must have the structure of the parameters.*(children|keys)",
        ),
        (lambda: mofo(block_axes={"w": 0, "b": 0.5}), TypeError, "block_axes must be"),
        (lambda: mofo(block_axes=jnp.int32(0)), TypeError, "static_args"),
        (
            lambda: mofo(filter_mask={"w": True}),
            ValueError,
            "(?s)filter_mask must have the structure of the parameters",
        ),
        (
            lambda: mofo(filter_mask={"w": True, "b": "no"}),
            TypeError,
            "filter_mask must hold bools, got 'no' for parameter b",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make().init(PARAMS)


def test_integer_parameters_are_refused():
    with pytest.raises(TypeError, match="parameter layer/i has dtype int32, but only"):
        mofo(0.1).init({"layer": {"i": jnp.arange(3), "w": jnp.ones(3)}})


def test_bad_scores():
    for score, message in (
        (lambda g, u, s, p: u | {"b": u["b"][:2]}, r"got \(2,\) for b, which there is"),
        (lambda g, u, s, p: {"w": u["w"]}, r"got no leaf for b, which there is \(3,\)"),
        (lambda g, u, s, p: list(u.values()), r"got no leaf for b, which there is"),
        (lambda g, u, s, p: u | {"b": u["b"].astype(int)}, "arrays, got int32 for b"),
    ):
        optimizer = filter_by_momentum(optax.adam(0.1), score=score)
        with pytest.raises(ValueError, match=message):
            optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, 10.0])
def test_a_schedule_that_begins_outside_the_range(value):
    message = rf"alpha must be in \(0, 1\], got {value} from its schedule at step 0"
    for schedule in (optax.linear_schedule(value, 0.5, 9), lambda step: value):
        with pytest.raises(ValueError, match=message):
            mofo(0.1, alpha=schedule).init(PARAMS)


@pytest.mark.parametrize("method", ["search", "top_k"])
def test_a_schedule_that_leaves_the_range(method):
    """Outside of jit an error; inside, where there is none, the formula for k holds."""
    values = [0.5, 0.0, -1.0, -np.inf, np.nan, 1.5, np.inf, 0.25]
    table = jnp.array(values)
    optimizer = filter_by_momentum(
        optax.adam(0.1), lambda step: table[step], method=method
    )
    params = jnp.arange(1.0, 21.0)
    state = optimizer.init(params)
    update, counts = jax.jit(optimizer.update), []
    for _ in values:
        before = state
        updates, state = update(params, state, params)
        counts.append(int((updates != 0).sum()))
    assert counts == [10, 1, 1, 1, 1, 20, 20, 5]
    with pytest.raises(ValueError, match=r"got inf from its schedule at step 6"):
        optimizer.update(params, before._replace(step=jnp.int32(6)), params)


def test_a_bad_constant_in_a_schedule_under_jit():
    optimizer = mofo(0.1, alpha=lambda step: 2.0)
    with pytest.raises(ValueError, match=r"got 2\.0 from its schedule"):
        jax.jit(optimizer.init)(PARAMS)
