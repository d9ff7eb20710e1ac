"""Our Llama beside transformers' on the same checkpoint: logits, gradients, tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from examples.llama.checkpoints.huggingface import save_hugging_face, tensor_name
from examples.llama.checkpoints.huggingface_config import from_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.generation import generate
from examples.llama.model.loss import cross_entropy_sum
from examples.llama.model.parameters import named_parameters
from examples.llama.model.sharding import make_mesh, parameter_sharding
from tests.parity.conftest import FAMILIES, VOCABULARY, random_model


@pytest.fixture(scope="session")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture
def tokens():
    return np.random.default_rng(1).integers(VOCABULARY, size=(3, 80), dtype=np.int32)


@nnx.jit
def run(model, tokens):
    return model(tokens)


def logits_of(reference, tokens):
    with torch.no_grad():
        return reference(torch.from_numpy(tokens).long()).logits.numpy()


def load_reference(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def test_logits(reference, model, tokens):
    expected = logits_of(reference, tokens)
    assert np.abs(expected).max() > 3  # 1e-4 of which is not much
    np.testing.assert_allclose(run(model, tokens), expected, rtol=0, atol=1e-4)


def test_gradients(reference, model, tokens):
    ids = torch.from_numpy(tokens).long()
    reference.zero_grad()
    loss = reference(ids, labels=ids).loss
    loss.backward()
    expected = {name: p.grad.numpy() for name, p in reference.named_parameters()}

    def mean_loss(model):
        targets, mask = tokens[:, 1:], np.ones_like(tokens[:, 1:], bool)
        # In chunks of some positions, as the trainer takes it.
        hidden, chunk = model.hidden(tokens[:, :-1]), 4 * 3 * VOCABULARY * 30
        total = cross_entropy_sum(
            hidden, model.head(), targets, mask, chunk_bytes=chunk
        )
        return total / mask.sum(dtype=np.float32)

    found, gradients = nnx.jit(nnx.value_and_grad(mean_loss))(model)
    assert abs(found - loss.item()) < 1e-4
    gradients = named_parameters(gradients)
    assert {tensor_name(name) for name in gradients} == expected.keys()
    for name, gradient in gradients.items():
        like = expected[tensor_name(name)]
        gradient = gradient.T if name.endswith("kernel") else gradient
        error = np.linalg.norm(gradient - like) / np.linalg.norm(like)
        assert error < 1e-4, name


def test_greedy_generation(reference, model):
    lengths, longest, count = (3, 11, 40, 1), 40, 40
    rng = np.random.default_rng(2)
    tokens = rng.integers(VOCABULARY, size=(len(lengths), longest), dtype=np.int32)
    mask = np.arange(longest)[::-1] < np.array(lengths)[:, None]

    def both(eos_id):
        settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        expected = reference.generate(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask).long(),
            generation_config=transformers.GenerationConfig(
                eos_token_id=eos_id, **settings
            ),
        )[:, longest:].numpy()
        found = generate(model, tokens, mask=mask, max_new_tokens=count, eos_id=eos_id)
        return expected, np.asarray(found)

    expected, found = both(eos_id=None)
    np.testing.assert_array_equal(found, expected)
    # Rows end at different times, and one at least in the middle.
    eos_id = int(expected[1, count // 2])
    expected, found = both(eos_id)
    width = expected.shape[1]  # up to where the last row ended
    ended = np.cumsum(expected == eos_id, axis=1) - (expected == eos_id) > 0
    assert ended[1].any()
    np.testing.assert_array_equal(found[:, :width], np.where(ended, eos_id, expected))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_transformers_loads_what_is_saved(
    model, checkpoint, tmp_path, tokens, param_dtype
):
    model = load_model(checkpoint, param_dtype=param_dtype)
    save_hugging_face(
        model, tmp_path / "ours", source=checkpoint, max_shard_bytes=100_000
    )
    saved = load_reference(tmp_path / "ours")
    expected = transformers.AutoConfig.from_pretrained(checkpoint).to_dict()
    config = saved.config.to_dict()
    for name in ("_name_or_path", "dtype", "initializer_range"):
        expected.pop(name), config.pop(name)
    assert config == expected
    params = dict(saved.named_parameters())
    for name, param in named_parameters(model).items():
        param = param.T if name.endswith("kernel") else param
        theirs = params.pop(tensor_name(name)).detach()
        assert theirs.dtype == getattr(torch, jnp.dtype(param_dtype).name)
        np.testing.assert_array_equal(theirs.float().numpy(), param.astype("f4"))
    assert not params
    np.testing.assert_allclose(
        run(model, tokens), logits_of(saved.float(), tokens), rtol=0, atol=1e-4
    )


def test_real_model(stories_model, tmp_path):
    """Converted from llama2.c's format, whose rotary pairs lie differently."""
    save_hugging_face(stories_model, tmp_path / "saved")
    saved = load_reference(tmp_path / "saved")
    tokens = np.random.default_rng(3).integers(512, size=(2, 200), dtype=np.int32)
    np.testing.assert_allclose(
        run(stories_model, tokens), logits_of(saved, tokens), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("shard", ["1GB", "50KB"])
def test_bfloat16_round_trip(tmp_path, shard):
    reference = random_model(**FAMILIES["llama3.1-8b"]).bfloat16()
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (shard == "1GB") == (tmp_path / "theirs" / "model.safetensors").exists()
    sharding = parameter_sharding(make_mesh("fsdp=4,tensor=2"))
    model = load_model(tmp_path / "theirs", param_dtype=jnp.bfloat16, sharding=sharding)
    save_hugging_face(model, tmp_path / "ours", source=tmp_path / "theirs")
    loaded = load_reference(tmp_path / "ours").state_dict()
    expected = reference.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == torch.bfloat16
        assert torch.equal(loaded[name].view(torch.int16), tensor.view(torch.int16))


def test_defaults_are_those_of_transformers():
    written = transformers.LlamaConfig().to_dict()
    assert from_hugging_face({"model_type": "llama"}) == from_hugging_face(written)
