"""MoFO in Tunix's PeftTrainer, with Tunix's own Llama. Run by `make test-tunix`.

In an environment of its own, as Tunix wants an older safetensors than the examples do.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
import tunix
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft import peft_trainer, utils

from mofo_jax import all_but_norms_and_biases, mofo

CONFIG = ModelConfig(
    num_layers=2,
    vocab_size=32,
    embed_dim=16,
    hidden_dim=24,
    num_heads=2,
    head_dim=8,
    num_kv_heads=1,
    rope_theta=10_000,
    norm_eps=1e-5,
)
TOKENS = np.random.default_rng(0).integers(1, CONFIG.vocab_size, size=(8, 12))


def make_model():
    """With random weights everywhere: Tunix's own start has zeros, without gradient."""
    model = Llama3(CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    state = jax.tree.map(
        lambda x: jnp.float32(rng.normal(scale=0.2, size=x.shape) + (x.ndim == 1)),
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, state)
    return model


def batch_of(tokens):
    return peft_trainer.TrainingInput(
        input_tokens=tokens, input_mask=np.ones(tokens.shape, bool)
    )


def model_input(batch):
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


def train(model, optimizer, steps, *, parts=1, **settings):
    """Steps on the same few sequences, each computed in `parts`."""
    config = tunix.TrainingConfig(
        eval_every_n_steps=1000,
        max_steps=steps,
        gradient_accumulation_steps=parts if parts > 1 else None,
        **settings,
    )
    trainer = tunix.PeftTrainer(model, optimizer, config)
    batches = [batch_of(rows) for rows in np.split(TOKENS, parts)]
    trainer.with_gen_model_input_fn(model_input).train(batches * steps)


def loss_of(model):
    inputs = model_input(batch_of(TOKENS))
    del inputs["input_mask"]
    logits, _ = model(cache=None, **inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], TOKENS[:, 1:]
    )
    return losses.mean()


def params_of(model):
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {jax.tree_util.keystr(path): np.array(x) for path, x in leaves}


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_moves_a_quarter_of_each_weight_and_all_norms(parts):
    model = make_model()
    before = params_of(model)
    optimizer = mofo(1e-3, alpha=0.25, filter_mask=all_but_norms_and_biases)
    train(model, optimizer, 1, parts=parts)
    for name, new in params_of(model).items():
        moved = (new != before[name]).sum()
        assert moved == (new.size if "norm" in name else new.size // 4), name


def test_learns():
    model = make_model()
    start = loss_of(model)
    train(model, mofo(1e-2, alpha=0.1), 40)
    assert loss_of(model) < 0.5 * start


def test_lora_is_filtered_and_all_else_frozen():
    inputs = model_input(batch_of(TOKENS))
    del inputs["input_mask"]
    provider = qwix.LoraProvider(module_path=".*q_proj|.*gate_proj", rank=4, alpha=8.0)
    model = qwix.apply_lora_to_model(
        make_model(), provider, cache=None, rngs=nnx.Rngs(0), **inputs
    )
    before = params_of(model)
    train(model, mofo(1e-3, alpha=0.25), 1)
    for name, new in params_of(model).items():
        # The second factor starts at zero, so that the first has no gradient yet.
        filtered = new.size // 4 if "lora_b" in name else 0
        assert (new != before[name]).sum() == filtered, name


def test_goes_on_from_its_checkpoint(tmp_path):
    optimizer = optax.inject_hyperparams(mofo)(
        optax.linear_schedule(1e-2, 0.0, 6), alpha=0.25
    )
    whole, first, second = make_model(), make_model(), make_model()
    nnx.update(second, jax.tree.map(jnp.zeros_like, nnx.state(second)))
    train(whole, optimizer, 6)
    train(first, optimizer, 3, checkpoint_root_directory=str(tmp_path))
    train(second, optimizer, 6, checkpoint_root_directory=str(tmp_path))
    for name, expected in params_of(whole).items():
        np.testing.assert_array_equal(params_of(second)[name], expected, name)
