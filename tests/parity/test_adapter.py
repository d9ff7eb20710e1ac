"""LoRA beside PEFT's: adapters go both ways, with equal logits, merged or not."""

import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from examples.llama.checkpoints.adapter import save_adapter
from examples.llama.checkpoints.loading import load_model
from examples.llama.convert import Args, convert
from examples.llama.model.lora import PROJECTIONS, lora_layers, merge_lora
from examples.llama.model.parameters import named_parameters
from examples.llama.training.loop import train
from tests.examples.llama.runs import config_of, write_files
from tests.parity.conftest import FAMILIES, VOCABULARY, random_model

# PEFT asks transformers for what its next major version will not have.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)
TOKENS = np.random.default_rng(1).integers(VOCABULARY, size=(3, 40), dtype=np.int32)


@nnx.jit
def run(model):
    return model(TOKENS)


def check_same(found, expected):
    """Within float32's rounding of the largest logits."""
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()


def load_base(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32
    ).eval()


def test_peft_loads_what_a_run_saves(tmp_path):
    files = write_files(tmp_path)
    changes = {
        "lora_rank": 4,
        "lora_alpha": 6.0,
        "lora_targets": "q_proj,o_proj,up_proj",
    }
    output = tmp_path / "run"
    train(
        config_of(files, output, lora_dropout=0.1, lora_merge=True, **changes),
        progress=False,
    )
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(output / "adapter")
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 6, 0.1)
    assert config.target_modules == {"q_proj", "o_proj", "up_proj"}
    model = load_model(files["model"], adapter=output / "adapter")
    found = run(model)
    assert np.abs(found - run(load_model(files["model"]))).max() > 0.01
    check_same(found, logits_of(loaded))
    merged = logits_of(loaded.merge_and_unload())
    check_same(run(load_model(output / "model")), merged)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["tinyllama-1.1b", "llama3.2-1b"])
def test_what_peft_saves(tmp_path, family, rslora):
    reference = random_model(**FAMILIES[family])
    reference.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=5,
        lora_alpha=7,
        lora_dropout=0.1,
        target_modules=list(PROJECTIONS),
        use_rslora=rslora,
        init_lora_weights=False,  # else B would be zero
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(reference, config)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = logits_of(theirs)
    model = load_model(tmp_path / "base", adapter=tmp_path / "adapter")
    assert len(lora_layers(model)) == 7 * len(model.layers)
    assert np.abs(run(load_model(tmp_path / "base")) - expected).max() > 0.1
    check_same(run(model), expected)
    # Saved again by us, PEFT reads its own numbers.
    save_adapter(model, tmp_path / "again", base=tmp_path / "base")
    again = peft.PeftModel.from_pretrained(
        load_base(tmp_path / "base"), tmp_path / "again"
    )
    check_same(logits_of(again), expected)
    # Merged: the same tensors.
    whole = theirs.merge_and_unload().state_dict()
    merge_lora(model)
    for name, param in named_parameters(model).items():
        if name.endswith("_proj.kernel"):
            like = whole[f"model.{name.removesuffix('.kernel')}.weight"].numpy().T
            np.testing.assert_allclose(param, like, rtol=1e-5, atol=1e-6)
    check_same(run(model), expected)


def test_merged_by_the_command(tmp_path):
    """An adapter whose targets are a regular expression, as PEFT merges it."""
    files = write_files(tmp_path)
    theirs = load_base(files["model"])
    config = peft.LoraConfig(
        r=3, target_modules=r".*mlp\.(up|down)_proj", init_lora_weights=False
    )
    theirs = peft.get_peft_model(theirs, config)
    theirs.save_pretrained(tmp_path / "adapter")
    convert(
        Args(
            model=files["model"],
            adapter=tmp_path / "adapter",
            output=tmp_path / "merged",
        )
    )
    merged = load_base(tmp_path / "merged")
    expected = logits_of(theirs.merge_and_unload())
    check_same(logits_of(merged), expected)
