"""Low-rank adaptation: where it starts, what it computes, what merging gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama.model.lora import (
    PROJECTIONS,
    LoRALinear,
    add_lora,
    lora_layers,
    merge_lora,
    start_dropout,
)
from tests.examples.llama.model.test_llama import make, names, random_tokens, run


def adapted(seed=None, **options):
    """A model with LoRA of rank 4 and alpha 6; B is drawn too where seed is given."""
    model = make(**options)
    add_lora(model, 4, 6.0, rngs=nnx.Rngs(0))
    if seed is not None:
        rng = np.random.default_rng(seed)
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
            if path[-1] == "lora_b":
                noise = rng.normal(scale=0.1, size=variable.shape)
                variable[...] = jnp.asarray(noise, variable.dtype)
    return model


def test_starts_as_the_model_itself():
    tokens = random_tokens((2, 7))
    np.testing.assert_array_equal(run(adapted(), tokens), run(make(), tokens))


def test_parameters():
    model = adapted()
    trained = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    found = {".".join(map(str, path)): variable.shape for path, variable in trained}
    kernels = {name: shape for name, shape in names(make()).items() if "_proj." in name}
    assert len(kernels) == 2 * 7 == 2 * len(PROJECTIONS)
    assert found == {
        name.replace("kernel", part): shape
        for name, (inputs, outputs) in kernels.items()
        for part, shape in (("lora_a", (inputs, 4)), ("lora_b", (4, outputs)))
    }
    # The weights keep their names, and are no parameters of LoRA's.
    rest = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    assert {".".join(map(str, path)) for path, _ in rest} == set(names(make()))


@pytest.mark.parametrize("tied", [True, False])
def test_merged_gives_the_same_logits(tied):
    model, tokens = adapted(seed=0, tie_word_embeddings=tied), random_tokens((2, 7))
    plain = make(tie_word_embeddings=tied)
    before, after = run(plain, tokens), run(model, tokens)
    assert np.abs(np.asarray(before - after)).max() > 0.1
    merge_lora(model)
    assert names(model) == names(plain) and not lora_layers(model)
    np.testing.assert_allclose(run(model, tokens), after, atol=2e-5)


def test_low_precision():
    """The frozen weights are bfloat16, what trains is float32."""
    model = adapted(seed=0, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    logits = run(model, random_tokens((2, 7)))
    exact = run(adapted(seed=0), random_tokens((2, 7)))
    np.testing.assert_allclose(logits, exact, atol=0.1 * float(jnp.std(exact)))
    dtypes = {
        name: {x.dtype.name for x in jax.tree.leaves(nnx.state(model, kind))}
        for name, kind in (
            ("lora", nnx.LoRAParam),
            ("frozen", nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))),
        )
    }
    assert dtypes == {"lora": {"float32"}, "frozen": {"bfloat16"}}
    merge_lora(model)
    merged = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in merged} == {jnp.dtype(jnp.bfloat16)}


def test_no_widened_copy_of_the_frozen_weights():
    """Computing in float32, the backward pass keeps bfloat16 weights as they are."""
    model = adapted(seed=0, param_dtype=jnp.bfloat16)
    graph, params, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def total(params):
        model = nnx.merge(graph, params, frozen, copy=True)
        return jnp.sum(model.hidden(random_tokens((2, 7))))

    _, backward = jax.eval_shape(lambda params: jax.vjp(total, params), params)
    kernels = {x[...].shape for x in (m.kernel for m in lora_layers(model).values())}
    kept = [x for x in jax.tree.leaves(backward) if x.shape in kernels]
    assert len(kept) >= 7 and {x.dtype.name for x in kept} == {"bfloat16"}


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",)])
def test_targets(targets):
    model = make()
    before = run(model, tokens := random_tokens((2, 7)))
    add_lora(model, 4, 6.0, rngs=nnx.Rngs(0), targets=targets)
    found = {path.rpartition(".")[2] for path in lora_layers(model)}
    assert found == set(targets) and len(lora_layers(model)) == 2 * len(targets)
    np.testing.assert_array_equal(run(model, tokens), before)
    merge_lora(model)
    np.testing.assert_array_equal(run(model, tokens), before)


def test_dropout():
    """As PEFT's: of A's input alone, and so that the expected output stays."""
    base = make().layers[0].mlp.up_proj
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(32, 4)), rng.normal(size=(4, 48))
    linear = LoRALinear(base, a, b, 8.0, dropout=0.25)
    x = jnp.asarray(rng.normal(size=(1, 32)), jnp.float32)
    plain, whole = base(x), linear(x)
    np.testing.assert_allclose(whole, plain + 2 * (x @ a.astype("f4")) @ b, rtol=1e-4)
    linear.dropout = nnx.Dropout(0.25, rngs=nnx.Rngs(0))
    many = linear(jnp.repeat(x, 4000, axis=0))
    assert len(np.unique(np.asarray(many[:, 0]))) > 3000
    scale = float(jnp.std(many - plain))
    assert np.abs(jnp.mean(many, axis=0) - whole[0]).max() < 0.1 * scale
    # Entries of x that are not dropped are 4 / 3 as large: never plain x W alone.
    assert np.abs(np.asarray(many - plain)).max(axis=1).min() > 0


def test_each_projection_drops_its_own():
    def dropped(key):
        model = adapted(seed=0)
        add_dropout(model, 0.5)
        start_dropout(model, jax.random.key(key))
        x = jnp.ones((8, 32))
        return {
            path: np.asarray(linear.dropout(x)).tobytes()
            for path, linear in lora_layers(model).items()
        }

    first = dropped(0)
    assert first == dropped(0) and len(set(first.values())) == len(first) == 14
    assert not set(first.values()) & set(dropped(1).values())


def add_dropout(model, rate):
    for linear in lora_layers(model).values():
        linear.dropout = nnx.Dropout(rate, deterministic=True)


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (0, 1.0, "lora_rank must be 1 to 16, got 0"),
        (17, 1.0, "lora_rank must be 1 to 16, got 17"),
        (4, 0.0, "lora_alpha must be above 0, got 0.0"),
    ],
)
def test_errors(rank, alpha, message):
    with pytest.raises(ValueError, match=message):
        add_lora(make(), rank, alpha, rngs=nnx.Rngs(0))
