"""The model against itself (cache, padding, dtypes) and against its formulas."""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama.model.architectures import LlamaConfig, RopeScaling
from examples.llama.model.llama import Llama, rope_frequencies

SCALING = RopeScaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def make(dtype=jnp.float32, param_dtype=jnp.float32, remat="none", **changes):
    """A model of CONFIG and `changes`, its weights the same whatever the dtypes."""
    config, rng = dataclasses.replace(CONFIG, **changes), np.random.default_rng(0)
    options = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}

    def create():
        return Llama(config, rngs=nnx.Rngs(0), **options)

    def fill(like):
        # Not the initial 0.02, at which attention is all but uniform.
        noise = rng.normal(scale=0.2, size=like.shape) + (like.ndim == 1)
        return jnp.asarray(noise.astype(np.float32)).astype(like.dtype)

    graph, state = nnx.split(nnx.eval_shape(create))
    return nnx.merge(graph, jax.tree.map(fill, state))


def random_tokens(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(CONFIG.vocab_size, size=shape, dtype=np.int32)


# Most of these tests' time is the compiler's, and nothing here runs twice.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.partial(quick_jit, static_argnums=0)
def _run(graph, state, tokens, options):
    return nnx.merge(graph, state)(tokens, **options)


def run(model, tokens, **options):
    # On the CPU a jitted call may read the caller's own array, and may still be at it
    # when it returns; a test that then changes the array would change the input.
    return jax.block_until_ready(_run(*nnx.split(model), tokens, options))


def names(model):
    flat, _ = jax.tree.flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {".".join(str(p.key) for p in path): leaf.shape for path, leaf in flat}


def test_parameters_have_hugging_face_names():
    model = make(head_dim=10)
    layer = {
        "input_layernorm.scale": (32,),
        "self_attn.q_proj.kernel": (32, 40),
        "self_attn.k_proj.kernel": (32, 20),
        "self_attn.v_proj.kernel": (32, 20),
        "self_attn.o_proj.kernel": (40, 32),
        "post_attention_layernorm.scale": (32,),
        "mlp.gate_proj.kernel": (32, 48),
        "mlp.up_proj.kernel": (32, 48),
        "mlp.down_proj.kernel": (48, 32),
    }
    expected = {f"layers.{i}.{name}": layer[name] for i in range(2) for name in layer}
    expected |= {"embed_tokens.embedding": (61, 32), "norm.scale": (32,)}
    expected |= {"lm_head.kernel": (32, 61)}
    assert names(model) == expected
    assert run(model, random_tokens((2, 5))).shape == (2, 5, 61)


def test_initial_weights():
    state = quick_jit(lambda: nnx.state(Llama(CONFIG, rngs=nnx.Rngs(0))))()
    for path, variable in nnx.to_flat_state(state):
        if path[-1] == "scale":
            assert np.all(np.asarray(variable[...]) == 1.0)
        else:
            assert np.std(np.asarray(variable[...])) == pytest.approx(0.02, rel=0.1)


def test_tied_head_is_the_embedding():
    tied, untied = make(tie_word_embeddings=True), make()
    assert set(names(untied)) - set(names(tied)) == {"lm_head.kernel"}
    weights = nnx.to_pure_dict(nnx.state(tied))
    weights["lm_head"] = {"kernel": weights["embed_tokens"]["embedding"].T}
    state = nnx.state(untied)
    nnx.replace_by_pure_dict(state, weights)
    nnx.update(untied, state)
    tokens = random_tokens((2, 7))
    np.testing.assert_allclose(run(untied, tokens), run(tied, tokens), atol=1e-5)


def test_causal():
    model, tokens = make(), random_tokens((1, 12))
    before = run(model, tokens)
    tokens[0, 8] = (tokens[0, 8] + 1) % CONFIG.vocab_size
    after = run(model, tokens)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert not np.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_cache_agrees_with_no_cache(kv_heads):
    model, tokens = make(num_key_value_heads=kv_heads), random_tokens((3, 17))
    expected = run(model, tokens)
    cache = model.init_cache(3, 20)
    first, cache = run(model, tokens[:, :5], cache=cache)
    second, cache = run(model, tokens[:, 5:9], cache=cache)

    def step(cache, token):
        logits, cache = model(token[:, None], cache=cache)
        return cache, logits[:, 0]

    cache, rest = quick_jit(functools.partial(jax.lax.scan, step))(
        cache, tokens[:, 9:].T
    )
    logits = jnp.concatenate([first, second, rest.swapaxes(0, 1)], axis=1)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert cache.length == 17
    assert cache.mask.sum(axis=1).tolist() == [17, 17, 17]


def test_grouped_heads_are_repeated_heads():
    grouped, full = make(num_key_value_heads=2), make(num_key_value_heads=4)
    weights = nnx.to_pure_dict(nnx.state(grouped))
    for layer in weights["layers"].values():
        for name in ("k_proj", "v_proj"):
            kernel = layer["self_attn"][name]["kernel"].reshape(32, 2, 8)
            repeated = jnp.repeat(kernel, 2, axis=1).reshape(32, 32)
            layer["self_attn"][name]["kernel"] = repeated
    state = nnx.state(full)
    nnx.replace_by_pure_dict(state, weights)
    nnx.update(full, state)
    tokens = random_tokens((2, 9))
    np.testing.assert_allclose(run(full, tokens), run(grouped, tokens), atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [False, True])
def test_padding_changes_nothing(side, cached):
    model, tokens = make(), random_tokens((2, 10))
    expected = run(model, tokens[:1, :6])
    real = slice(4, 10) if side == "left" else slice(0, 6)
    padded = random_tokens((2, 10), seed=1)
    padded[0, real] = tokens[0, :6]
    mask = np.array([[False] * 10, [True] * 10])
    mask[0, real] = True
    positions = np.maximum(np.cumsum(mask, axis=1, dtype=np.int32) - 1, 0)
    # The second row is full: each row has its own mask.
    full = run(model, padded[1:])
    if cached:
        cache, logits = model.init_cache(2, 10), []
        for part in (slice(0, 3), slice(3, 8), slice(8, 10)):
            arguments = {"mask": mask[:, part], "positions": positions[:, part]}
            some, cache = run(model, padded[:, part], cache=cache, **arguments)
            logits.append(some)
        logits = jnp.concatenate(logits, axis=1)
    else:
        logits = run(model, padded, mask=mask, positions=positions)
    np.testing.assert_allclose(logits[:1, real], expected, atol=2e-5)
    np.testing.assert_allclose(logits[1:], full, atol=2e-5)
    assert np.all(np.isfinite(logits))


def test_positions_are_relative():
    model, tokens = make(), random_tokens((2, 8))
    arange = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    expected = run(model, tokens)
    np.testing.assert_array_equal(run(model, tokens, positions=arange), expected)
    shifted = run(model, tokens, positions=arange + 1000)
    np.testing.assert_allclose(shifted, expected, atol=1e-3)
    stretched = run(model, tokens, positions=2 * arange)
    assert not np.allclose(stretched, expected, atol=1e-2)


def test_rope_frequencies():
    config = dataclasses.replace(CONFIG, head_dim=8, rope_theta=500000.0)
    expected = [500000.0**-exponent for exponent in (0, 0.25, 0.5, 0.75)]
    frequencies = rope_frequencies(config)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)


def test_llama3_rope_scaling():
    """Against Meta's apply_scaling of Llama 3.1, written out."""
    config = dataclasses.replace(
        CONFIG, head_dim=128, rope_theta=500000.0, rope_scaling=SCALING
    )
    expected, branches = [], set()
    for frequency in (500000.0 ** -(i / 128) for i in range(0, 128, 2)):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            branches.add("kept")
            expected.append(frequency)
        elif wavelength > 8192 / 1.0:
            branches.add("stretched")
            expected.append(frequency / 8.0)
        else:
            branches.add("between")
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    assert len(branches) == 3
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)
    model = make(head_dim=128, rope_theta=500000.0, rope_scaling=SCALING)
    plain = make(head_dim=128, rope_theta=500000.0)
    tokens, far = random_tokens((1, 4)), np.array([[0, 9000, 18000, 60000]], np.int32)
    logits = run(model, tokens, positions=far)
    assert not np.allclose(logits, run(plain, tokens, positions=far), atol=1e-3)


@pytest.mark.parametrize(
    ("param_dtype", "tied"), [(jnp.float32, True), (jnp.bfloat16, False)]
)
def test_bfloat16(param_dtype, tied):
    low = make(jnp.bfloat16, param_dtype, tie_word_embeddings=tied)
    high = make(tie_word_embeddings=tied)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(low))}
    assert dtypes == {jnp.dtype(param_dtype)}
    tokens = random_tokens((2, 16))
    logits, expected = (np.asarray(run(model, tokens)) for model in (low, high))
    assert logits.dtype == np.float32
    assert np.any(logits != logits.astype(jnp.bfloat16).astype(np.float32))
    error = lambda x: np.sqrt(np.mean((x - expected) ** 2)) / expected.std()
    assert 1e-3 < error(logits) < 0.03  # bfloat16's: neither float32's nor worse
    cache = low.init_cache(2, 16)
    assert cache.layers[0][0].dtype == jnp.bfloat16
    cached, _ = run(low, tokens, cache=cache)
    assert 1e-3 < error(np.asarray(cached)) < 0.03


@pytest.fixture
def optax_promotion():
    """The gradient of jax.nn.dot_product_attention mixes dtypes, as Optax does."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients(dtype, optax_promotion):
    graph, state = nnx.split(make(dtype))
    tokens = random_tokens((2, 9))
    mask = np.array([[False] * 3 + [True] * 5, [True] * 8])

    @quick_jit
    @jax.value_and_grad
    def loss(state):
        logits = nnx.merge(graph, state)(tokens[:, :-1], mask=mask)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1
        )
        return -jnp.mean(picked)

    value, gradients = jax.tree.map(np.asarray, loss(state))
    assert np.isfinite(value)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert gradient.dtype == np.float32, path
        assert np.all(np.isfinite(gradient)) and np.any(gradient), path
    # A step of s / |gradient|^2 along the gradient changes the loss by s.
    norm2 = sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradients))
    change = 0.01 if dtype == jnp.float32 else 0.1
    high, low = (
        loss(jax.tree.map(lambda p, g, s=s: p + s / norm2 * g, state, gradients))[0]
        for s in (change, -change)
    )
    assert high - low == pytest.approx(2 * change, rel=0.1)


def test_nnx_transforms():
    model, tokens = make(), random_tokens((2, 9))
    loss = nnx.jit(nnx.value_and_grad(lambda model: jnp.mean(model(tokens) ** 2)))
    value, gradients = loss(model)
    assert value == pytest.approx(np.mean(np.asarray(run(model, tokens)) ** 2))
    assert jax.tree.structure(gradients) == jax.tree.structure(nnx.state(model))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packed_texts_do_not_see_each_other(dtype):
    model, lengths = make(dtype), (5, 1, 9, 3)
    ids = np.repeat(np.arange(1, 5, dtype=np.int32), lengths)
    segment_ids = np.pad(ids, (0, 2))[None]  # padding is segment 0
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(2)])[None]
    given = {"segment_ids": segment_ids, "positions": positions.astype(np.int32)}
    tokens = random_tokens((1, 20))
    packed = np.asarray(run(model, tokens, **given))
    for segment in range(1, 5):
        inside = segment_ids[0] == segment
        alone = run(model, tokens[:, inside])
        error = np.sqrt(np.mean((packed[:, inside] - np.asarray(alone)) ** 2))
        assert error < (1e-5 if dtype == jnp.float32 else 0.03) * packed.std()
        # Other tokens everywhere else change not one bit of it.
        others = np.where(inside, tokens, random_tokens((1, 20), seed=1))
        changed = np.asarray(run(model, others, **given))
        np.testing.assert_array_equal(packed[:, inside], changed[:, inside])


def test_remat_keeps_less_and_changes_no_number():
    tokens = random_tokens((4, 32))

    def kept(remat):
        """Bytes kept for the backward pass, and the gradient."""
        graph, state = nnx.split(make(remat=remat))
        _, backward = jax.vjp(
            lambda state: jnp.mean(nnx.merge(graph, state)(tokens) ** 2), state
        )
        arrays = jax.tree.leaves(backward)
        return sum(x.nbytes for x in arrays), backward(jnp.float32(1))

    none, dots, full = map(kept, ("none", "dots", "full"))
    assert full[0] < 0.8 * dots[0] and dots[0] < 0.8 * none[0]
    for _, gradients in (dots, full):
        chex.assert_trees_all_close(gradients, none[1], rtol=1e-4, atol=1e-6)


def test_unknown_remat():
    with pytest.raises(ValueError, match="remat must be one of none, dots, full, got"):
        make(remat="some")


def test_too_many_tokens():
    model = make()
    with pytest.raises(ValueError, match=r"65 tokens .* max_position_embeddings, 64"):
        model(random_tokens((1, 65)))
    with pytest.raises(ValueError, match="5 tokens are more than the 4 cache slots"):
        model(random_tokens((1, 5)), cache=model.init_cache(1, 4))
    with pytest.raises(ValueError, match="65 tokens"):
        model(random_tokens((1, 65)), cache=model.init_cache(1, 70))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive int, got 0"),
        ({"hidden_size": 32.0}, "hidden_size must be a positive int, got 32.0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive int, got -1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a positive float, got 0.0"),
        ({"rope_theta": "1e4"}, "rope_theta must be a positive float, got '1e4'"),
        ({"rope_theta": math.nan}, "rope_theta must be a positive float, got nan"),
        ({"rope_theta": math.inf}, "rope_theta must be 1.2e-38 to 3.4e+38, got inf"),
        ({"rope_theta": 10**400}, "rope_theta must be 1.2e-38 to 3.4e+38, got 10000"),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps must be 1.2e-38 to 3.4e+38, got 1e-60"),
        ({"vocab_size": True}, "vocab_size must be a positive int, got True"),
        ({"vocab_size": 1 << 31}, "vocab_size must be 1 to 2147483647, got 2147483648"),
        (
            {"max_position_embeddings": 10**12},
            "max_position_embeddings must be 1 to 16777216, got 1000000000000",
        ),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads must divide num_attention_heads (4), got 3",
        ),
        (
            {"hidden_size": 30, "head_dim": None},
            "hidden_size must be a multiple of num_attention_heads (4) where head_dim "
            "is None, got 30",
        ),
        ({"head_dim": 7}, "head_dim must be positive and even, got 7"),
        ({"head_dim": -2}, "head_dim must be positive and even, got -2"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(CONFIG, **changes)


def test_the_last_position_that_is_allowed():
    """Its rotary angle differs from that of the one before, as no later one's does."""
    last = dataclasses.replace(CONFIG, max_position_embeddings=1 << 24)
    position = np.float32(last.max_position_embeddings)
    assert position - 1 != position == position + 1


def test_head_dim_by_default():
    assert dataclasses.replace(CONFIG, head_dim=None).head_dim == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_type": "yarn"}, "rope_type must be 'llama3', got 'yarn'"),
        ({"factor": -8.0}, "factor must be a positive float, got -8.0"),
        ({"factor": math.inf}, "factor must be 1.2e-38 to 3.4e+38, got inf"),
        (
            {"original_max_position_embeddings": 10**12},
            "original_max_position_embeddings must be 1 to 16777216, got 1000000000000",
        ),
        (
            {"high_freq_factor": 1.0},
            "high_freq_factor must be above low_freq_factor (1.0), got 1.0",
        ),
    ],
)
def test_bad_rope_scaling(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(SCALING, **changes)
