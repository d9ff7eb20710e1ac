"""The mask is bit for bit the one of jax.lax.top_k."""

import functools
import logging
import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from mofo_jax import top_fraction_mask
from mofo_jax.testing import add_counts, integer_limit

pytestmark = pytest.mark.usefixtures("program")

DTYPES = ["float32", "float16", "bfloat16", "complex64"]
SHAPES = [(1,), (7,), (48,), (3, 5), (16, 6), (2, 3, 4), (1, 32, 1)]


# Written without jax.lax, from the definition: bits order magnitudes, ties go to the
# lower index.
def reference_mask(x, alpha, block_axes=()):
    x = np.asarray(x)
    axes = [a for a in range(x.ndim) if a not in block_axes]
    magnitude = np.abs(x)
    bits = magnitude.view(f"u{magnitude.dtype.itemsize}").astype(np.int64)
    rows = bits.transpose(*block_axes, *axes).reshape(
        -1, math.prod(x.shape[a] for a in axes)
    )
    n = rows.shape[1]
    k = min(n, max(1, math.floor(alpha * n)))
    mask = np.zeros(rows.shape, bool)
    order = np.argsort(-rows, axis=1, kind="stable")[:, :k]
    np.put_along_axis(mask, order, True, axis=1)
    shape = [x.shape[a] for a in (*block_axes, *axes)]
    return mask.reshape(shape).transpose(np.argsort([*block_axes, *axes]))


def mask_of(x, alpha, block_axes=None):
    """By the search, whose compiled program serves all alphas."""
    return top_fraction_mask(jnp.asarray(x), alpha, block_axes=block_axes)


@functools.partial(jax.jit, static_argnames="block_axes")
def mask_by_top_k(x, alpha, block_axes=None):
    return top_fraction_mask(x, alpha, block_axes=block_axes, method="top_k")


@jax.jit
def top_k_of_magnitudes(x, k):
    """The definition, word for word, with one program for all k."""
    _, indices = jax.lax.top_k(jnp.abs(x).reshape(-1), x.size)
    marks = jnp.arange(x.size) < k
    return jnp.zeros(x.size, bool).at[indices].set(marks).reshape(x.shape)


def is_subnormal(x):
    magnitude = np.abs(x).astype(np.float64)
    return (magnitude > 0) & (magnitude < float(jnp.finfo(x.dtype).smallest_normal))


@st.composite
def arrays(draw, dtype, shape):
    """Arrays with many ties, extreme values and raw bit patterns of a dtype."""
    dtype = jnp.dtype(dtype)
    if dtype == np.complex64:
        parts = st.sampled_from([0.0, -0.0, 1.0, -2.0, 3.5, np.inf, 1e-41])
        real, imag = (draw(hnp.arrays("float32", shape, elements=parts)) for _ in "ab")
        x = real.astype(np.complex64)
        x.imag = imag
        return x
    unsigned = np.dtype(f"u{dtype.itemsize}")
    special = (
        np.array(
            [
                0.0,
                -0.0,
                1.0,
                -1.0,
                2.0,
                np.inf,
                -np.inf,
                np.nan,
                jnp.finfo(dtype).tiny,
                jnp.finfo(dtype).smallest_subnormal,
                jnp.finfo(dtype).max,
            ]
        )
        .astype(dtype)
        .view(unsigned)
    )
    elements = draw(
        st.sampled_from(
            [
                st.sampled_from([int(s) for s in special]),
                st.integers(0, np.iinfo(unsigned).max),
            ]
        )
    )
    return draw(hnp.arrays(unsigned, shape, elements=elements)).view(dtype)


def axes_of(shape):
    ndim = len(shape)
    several = [(0, ndim - 1)] if ndim > 1 else []
    return [(), *((a,) for a in range(ndim)), *several]


# Each is a program to compile; it is values that are drawn.
ALL_KINDS = [
    (dtype, shape, axes)
    for shape in SHAPES
    for axes in axes_of(shape)
    for dtype in DTYPES
]
# Some of them, with every shape and dtype.
KINDS = ALL_KINDS[::9]


@pytest.mark.parametrize(
    "kinds", [KINDS, pytest.param(ALL_KINDS, marks=pytest.mark.thorough)]
)
@given(st.data(), st.sampled_from([0.01, 0.3, 0.5, 1.0]))
@settings(max_examples=120)
def test_mask_equals_top_k(kinds, data, alpha):
    dtype, shape, block_axes = data.draw(st.sampled_from(kinds))
    x = data.draw(arrays(dtype, shape))
    mask = np.asarray(mask_of(x, alpha, block_axes))
    by_top_k = mask_by_top_k(x, jnp.float32(alpha), block_axes)
    np.testing.assert_array_equal(mask, by_top_k)
    if not block_axes and (x.dtype != jnp.bfloat16 or not is_subnormal(x).any()):
        k = min(x.size, max(1, math.floor(alpha * x.size)))
        np.testing.assert_array_equal(mask, top_k_of_magnitudes(x, jnp.int32(k)))
    if x.dtype != np.complex64:  # NumPy rounds a complex magnitude otherwise
        np.testing.assert_array_equal(mask, reference_mask(x, alpha, block_axes))


def test_subnormals_of_bfloat16_are_ordered():
    """As float32's and float16's are; jax.lax.top_k ties them with zero on the CPU."""
    x = np.array([0, 0x0001, 0x0040, 0, 0x0080], np.uint16).view(jnp.bfloat16)
    for method in ("search", "top_k"):
        mask = top_fraction_mask(jnp.asarray(x), 0.6, method=method)
        assert mask.tolist() == [False, True, True, False, True]


def test_float64_equals_top_k():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(9, 40))
        x[:, :20] = np.round(x[:, :20])
        for alpha in (0.05, 0.5):
            mask = mask_of(jnp.asarray(x), alpha)
            assert jnp.asarray(x).dtype == jnp.float64
            np.testing.assert_array_equal(mask, reference_mask(x, alpha))


@pytest.mark.parametrize("size", [4096, 100_003])
def test_large_arrays(size):
    rng = np.random.default_rng(size)
    normal = rng.normal(size=size).astype(np.float32)
    for x in (
        normal,
        np.round(normal),
        normal * (rng.random(size) < 0.01),
        np.ones(size, np.float32),
        np.exp(20 * normal).astype(np.float32),
    ):
        mask = np.asarray(mask_of(x, 0.1))
        np.testing.assert_array_equal(mask, reference_mask(x, 0.1))
        assert mask.sum() == size // 10


@pytest.mark.thorough
@given(st.sampled_from([1, 10, 57, 300]), st.floats(1e-3, 1.0))
@settings(max_examples=30)
def test_number_selected(n, alpha):
    mask = mask_of(np.zeros(n, np.float32), alpha)
    assert mask.sum() == min(n, max(1, math.floor(alpha * n)))


@pytest.mark.parametrize("method", ["search", "top_k"])
def test_traced_alpha(method):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 50)), jnp.float32)
    masks = jax.jit(lambda x, a: top_fraction_mask(x, a, method=method))
    for alpha in (0.001, 0.1, 0.7, 1.0):
        np.testing.assert_array_equal(
            masks(x, jnp.float32(alpha)), reference_mask(x, alpha)
        )
    # Out of range it cannot be refused, and is clamped.
    for alpha, count in ((0.0, 1), (-1.0, 1), (jnp.nan, 1), (7.0, 1000)):
        assert masks(x, jnp.float32(alpha)).sum() == count


def test_traced_alpha_of_low_precision_still_reaches_every_entry():
    # 1 * 2051 is not a float16, nor 1 * (2**24 + 1) a float32.
    masks = jax.jit(lambda x, a: top_fraction_mask(x, a))
    assert masks(jnp.arange(2051.0), jnp.float16(1)).all()


def test_scalars_empty_arrays_and_single_entries():
    assert top_fraction_mask(jnp.float32(0), 0.1).item() is True
    assert top_fraction_mask(jnp.zeros((3, 0)), 0.1).shape == (3, 0)
    assert top_fraction_mask(jnp.zeros((4, 1)), 0.1, block_axes=0).all()


@pytest.mark.parametrize(
    "limit", [16, *(pytest.param(n, marks=pytest.mark.thorough) for n in (4, 50))]
)
def test_counts_of_several_limbs(limit):
    """Arrays beyond 2^32 entries count in two limbs; here the limit is lowered."""
    x = np.random.default_rng(limit).normal(size=(3, 2, 3, 3)).astype(np.float32)
    with integer_limit(limit):
        for values in (x, np.round(x), np.ones_like(x)):
            for alpha in (0.1, 0.6, jnp.float32(0.6)):
                mask = top_fraction_mask(jnp.asarray(values), alpha)
                expected = reference_mask(values, float(alpha))
                np.testing.assert_array_equal(mask, expected)
            mask = top_fraction_mask(jnp.asarray(values), 0.4, block_axes=0)
            np.testing.assert_array_equal(mask, reference_mask(values, 0.4, (0,)))


def test_counts_beyond_32_bits_add_up():
    """Partial counts of a huge array add up exactly, carries included."""
    partial = np.array([2**32 - 1, 2**32 - 1, 12345, 2**31, 7], np.uint32)
    assert add_counts(partial) == sum(map(int, partial))


# Bytes an entry, of four. Beside simulated devices, XLA for the CPU writes out partial
# counts of four probes; one CPU device needs a count for each row.
TEMPORARY = {"any device": 0.8, "one CPU device": 0.14}


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(2**16, 2**16), (128, 16384, 53248)])
def test_huge_arrays_compile_without_temporaries(shape, program):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    compiled = jax.jit(lambda x: top_fraction_mask(x, 0.1)).lower(x).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < TEMPORARY[program] * math.prod(shape)


@pytest.mark.thorough
@pytest.mark.parametrize("block_axes", [None, 0, (0, 1)])
def test_no_copy_of_magnitudes_is_kept(block_axes, program):
    """A loop over a stored |x| would need x's size of temporary memory."""
    x = jax.ShapeDtypeStruct((8, 64, 16384), jnp.float32)

    def keep(x, p):
        return jnp.where(top_fraction_mask(x, 0.1, block_axes=block_axes), x, p)

    memory = jax.jit(keep).lower(x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < TEMPORARY[program] * 2**23


def test_eager_calls_compile_once():
    x = jnp.arange(37.0)
    top_fraction_mask(x, 0.1)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr(logging.Logger, "handle", lambda self, record: compiled.append(1))
        top_fraction_mask(x, 0.1)
        assert not compiled
        top_fraction_mask(jnp.arange(38.0), 0.1)
        assert compiled  # the watch works


@pytest.mark.thorough
def test_vmap():
    x = np.random.default_rng(0).normal(size=(5, 60)).astype(np.float32)
    x[2] = np.round(x[2])
    masks = jax.vmap(lambda row: top_fraction_mask(row, 0.2))(x)
    np.testing.assert_array_equal(masks, reference_mask(x, 0.2, (0,)))
    alphas = [0.1, 0.2, 0.3, 0.9, 1.0]
    masks = jax.vmap(top_fraction_mask)(x, jnp.array(alphas))
    for row, mask, alpha in zip(x, masks, alphas, strict=True):
        np.testing.assert_array_equal(mask, reference_mask(row, alpha))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"alpha": 0}, ValueError, r"alpha must be in \(0, 1\], got 0"),
        ({"alpha": -0.1}, ValueError, "alpha must be in .* got -0.1"),
        ({"alpha": 1.01}, ValueError, "alpha must be in .* got 1.01"),
        ({"alpha": math.nan}, ValueError, "alpha must be in .* got nan"),
        ({"alpha": jnp.float32(2)}, ValueError, "alpha must be in .* got 2.0"),
        ({"alpha": "0.1"}, TypeError, "alpha must be a number in .* got '0.1'"),
        ({"alpha": True}, TypeError, "alpha must be a number in .* got True"),
        ({"alpha": jnp.ones(2)}, TypeError, r"real scalar, got float32\[2\]"),
        ({"alpha": jnp.int32(2)}, ValueError, "alpha must be in .* got 2.0"),
        ({"alpha": jnp.bool_(1)}, TypeError, r"real scalar, got bool\[\]"),
        ({"block_axes": 2}, ValueError, r"2 out of range .* allowed are -2 to 1"),
        ({"block_axes": (0, -3)}, ValueError, "out of range"),
        ({"block_axes": (0, -2)}, ValueError, "repeats an axis"),
        ({"block_axes": 0.5}, TypeError, "must be an int.* got 0.5"),
        ({"block_axes": "0"}, TypeError, "must be an int.* got '0'"),
        ({"x": np.arange(3)}, TypeError, "x must be a floating .* got dtype int"),
        ({"x": jnp.ones(3, "float8_e4m3fnuz")}, TypeError, "16 bits .* float8_e4m3"),
        ({"x": np.float32(1), "block_axes": 0}, ValueError, "which is a scalar"),
        ({"method": "sort"}, ValueError, "method must be .* got 'sort'"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    arguments = {"x": jnp.ones((4, 3)), "alpha": 0.5, **kwargs}
    with pytest.raises(error, match=message):
        top_fraction_mask(**arguments)
