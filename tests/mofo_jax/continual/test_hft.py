"""Half fine-tuning's choice: the paper's halves, drawn anew for each round."""

import jax
import jax.numpy as jnp
import optax
import pytest

from mofo_jax.continual import half_fine_tuning_mask

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def ours(layers):
    layer = {
        "self_attn": {name: {"kernel": jnp.ones(1)} for name in ATTENTION},
        "mlp": {name: {"kernel": jnp.ones(1)} for name in FEED_FORWARD},
    } | {name: {"scale": jnp.ones(1)} for name in NORMS}
    return {
        "embed_tokens": {"embedding": jnp.ones(1)},
        "layers": [jax.tree.map(lambda x: x, layer) for _ in range(layers)],
        "norm": {"scale": jnp.ones(1)},
        "lm_head": {"kernel": jnp.ones(1)},
    }


def hugging_face(layers):
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for i in range(layers):
        names += [f"model.layers.{i}.self_attn.{name}.weight" for name in ATTENTION]
        names += [f"model.layers.{i}.mlp.{name}.weight" for name in FEED_FORWARD]
        names += [f"model.layers.{i}.{name}.weight" for name in NORMS]
    return dict.fromkeys(names, 0.0)


@pytest.mark.parametrize("layers", [1, 4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_halves(layers, seed):
    mask = half_fine_tuning_mask(ours(layers), seed)
    assert mask["embed_tokens"]["embedding"] and mask["lm_head"]["kernel"]
    feed_forward, norms = [], [mask["norm"]["scale"]]
    for layer in mask["layers"]:
        assert sum(layer["self_attn"][name]["kernel"] for name in ATTENTION) == 2
        feed_forward.append(sum(layer["mlp"][name]["kernel"] for name in FEED_FORWARD))
        norms += [layer[name]["scale"] for name in NORMS]
    assert sorted(feed_forward) == [1] * (layers - layers // 2) + [2] * (layers // 2)
    assert sum(norms) == (2 * layers + 1) // 2


def test_names_of_hugging_face_give_the_same_choice():
    mask, theirs = (half_fine_tuning_mask(f(4), 7) for f in (ours, hugging_face))
    for i, layer in enumerate(mask["layers"]):
        for name in ATTENTION:
            of_theirs = theirs[f"model.layers.{i}.self_attn.{name}.weight"]
            assert layer["self_attn"][name]["kernel"] == of_theirs


def test_rounds_differ_and_a_seed_repeats():
    masks = [half_fine_tuning_mask(hugging_face(8), seed) for seed in range(6)]
    assert len({str(mask) for mask in masks}) == 6
    assert half_fine_tuning_mask(hugging_face(8), 3) == masks[3]
    reordered = dict(reversed(hugging_face(8).items()))
    assert half_fine_tuning_mask(reordered, 3) == masks[3]


def test_every_matrix_has_its_turn():
    masks = [half_fine_tuning_mask(hugging_face(2), seed) for seed in range(200)]
    for name in masks[0]:
        share = sum(mask[name] for mask in masks) / 200
        always = "embed" in name or "lm_head" in name
        assert share == 1 if always else 0.3 < share < 0.7, name


def test_biases_and_lora_go_with_their_matrix():
    params = {
        f"layers/0/self_attn/{name}/{part}": 0.0
        for name in ATTENTION
        for part in ("kernel", "bias", "kernel_lora_a", "kernel_lora_b")
    }
    mask = half_fine_tuning_mask(params, 0)
    for name in ATTENTION:
        assert len({v for k, v in mask.items() if name in k}) == 1
    assert sum(mask.values()) == 8


@jax.numpy_dtype_promotion("standard")  # Optax mixes dtypes
def test_with_optax():
    """Frozen parameters stay, and have no moments."""
    params = ours(2)
    mask = half_fine_tuning_mask(params, 0)
    frozen = jax.tree.map(lambda trained: not trained, mask)
    optimizer = optax.selective_transform(optax.adam(0.1), freeze_mask=frozen)
    state = optimizer.init(params)
    updates, _ = optimizer.update(params, state, params)
    moved = jax.tree.map(lambda u: bool(u[0] != 0), updates)
    assert moved == mask
    moments = jax.tree.leaves(optax.tree.get(state, "mu"))
    assert len(moments) == sum(jax.tree.leaves(mask))


def test_bad_arguments():
    with pytest.raises(
        ValueError, match="seed must be an integer of 0 or above, got -1"
    ):
        half_fine_tuning_mask(ours(1), -1)
    with pytest.raises(
        ValueError, match="parameter dense/kernel has none of the names"
    ):
        half_fine_tuning_mask({"dense": {"kernel": 0.0}}, 0)
