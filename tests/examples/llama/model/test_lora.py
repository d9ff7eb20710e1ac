"""Low-rank adaptation: where it starts, what it computes, what merging gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama.model.lora import PROJECTIONS, add_lora, merge_lora
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
    assert len(kernels) == 2 * 7 == 2 * sum(map(len, PROJECTIONS.values()))
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
    merged = merge_lora(nnx.to_pure_dict(nnx.state(model)), 6 / 4)
    state = nnx.state(plain)
    nnx.replace_by_pure_dict(state, merged)  # of the same names, or it raises
    nnx.update(plain, state)
    np.testing.assert_allclose(run(plain, tokens), after, atol=2e-5)


def test_low_precision():
    model = adapted(seed=0, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    logits = run(model, random_tokens((2, 7)))
    exact = run(adapted(seed=0), random_tokens((2, 7)))
    np.testing.assert_allclose(logits, exact, atol=0.1 * float(jnp.std(exact)))
    merged = jax.tree.leaves(merge_lora(nnx.to_pure_dict(nnx.state(model)), 1.5))
    assert {leaf.dtype for leaf in merged} == {jnp.dtype(jnp.bfloat16)}


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
