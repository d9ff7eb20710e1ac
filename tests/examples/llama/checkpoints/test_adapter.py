"""PEFT's adapters: what is written, what is read, and what is refused."""

import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from examples.llama.checkpoints.adapter import load_adapter, save_adapter
from examples.llama.checkpoints.loading import load_model
from examples.llama.convert import main as convert
from examples.llama.generate import main as generate
from examples.llama.model.lora import add_lora, lora_layers, merge_lora
from examples.llama.model.parameters import named_parameters
from examples.llama.model.sharding import make_mesh, parameter_sharding
from tests.examples.llama.checkpoints.huggingface_files import (
    random_tensors,
    write_checkpoint,
)
from tests.examples.llama.runs import files_below, write_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers."
UP = f"{PREFIX}0.mlp.up_proj.lora_A.weight"
TOKENS = np.random.default_rng(0).integers(48, size=(2, 9), dtype=np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tensors = {name: 0.2 * x for name, x in random_tensors().items()}
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", tensors)


def adapted(base, targets=("q_proj", "up_proj"), **options):
    """A model with LoRA that is not zero."""
    model = load_model(base)
    add_lora(model, 3, 5.0, rngs=nnx.Rngs(0), targets=targets, **options)
    rng = np.random.default_rng(1)
    for linear in lora_layers(model).values():
        noise = rng.normal(scale=0.3, size=linear.lora_b.shape)
        linear.lora_b[...] = jnp.asarray(noise, jnp.float32)
    return model


@pytest.fixture
def adapter(base, tmp_path):
    save_adapter(adapted(base, dropout=0.1), tmp_path / "adapter", base="org/base")
    return tmp_path / "adapter"


@nnx.jit
def run(model):
    return model(TOKENS)


def change(adapter, **settings):
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewrite(adapter, edit):
    tensors = load_file(adapter / WEIGHTS)
    edit(tensors)
    save_file(tensors, adapter / WEIGHTS)


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


def test_round_trip(base, adapter):
    model, loaded = adapted(base), load_model(base, adapter=adapter)
    np.testing.assert_array_equal(run(loaded), run(model))
    assert np.abs(run(model) - run(load_model(base))).max() > 0.03
    settings = json.loads((adapter / CONFIG).read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5}
    expected |= {"lora_dropout": 0.1, "target_modules": ["q_proj", "up_proj"]}
    expected |= {"base_model_name_or_path": "org/base", "bias": "none"}
    assert settings.items() >= expected.items()
    tensors = load_file(adapter / WEIGHTS)
    assert tensors[UP].shape == (3, 32) and len(tensors) == 2 * 2 * 2
    linear = lora_layers(model)["layers.0.mlp.up_proj"]
    np.testing.assert_array_equal(tensors[UP], linear.lora_a[...].T)
    # Again over the first one, with others.
    save_adapter(adapted(base, ("o_proj",)), adapter, base="other")
    assert len(load_file(adapter / WEIGHTS)) == 2 * 2


def test_as_peft_defines_it(base, adapter):
    """Tensors in bfloat16, scaled by the root of the rank, for some layers alone."""
    change(adapter, use_rslora=True, layers_to_transform=[1], bias=None)

    def edit(tensors):
        for name in [name for name in tensors if name.startswith(f"{PREFIX}0")]:
            del tensors[name]
        for name in tensors:
            tensors[name] = tensors[name].astype(jnp.bfloat16)

    rewrite(adapter, edit)
    model = load_model(base, adapter=adapter)
    assert {path.split(".")[1] for path in lora_layers(model)} == {"1"}
    merge_lora(model)
    params = named_parameters(load_model(base))
    tensors = load_file(adapter / WEIGHTS)
    a, b = (
        tensors[f"{PREFIX}1.mlp.up_proj.lora_{x}.weight"].astype("f4") for x in "AB"
    )
    expected = params["layers.1.mlp.up_proj.kernel"] + (5 / math.sqrt(3)) * (b @ a).T
    found = named_parameters(model)["layers.1.mlp.up_proj.kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_sharded(base, adapter):
    sharding = parameter_sharding(make_mesh("fsdp=2,tensor=2"))
    model = load_model(base, sharding=sharding, adapter=adapter)
    for path, linear in lora_layers(model).items():
        for part in ("lora_a", "lora_b"):
            x = getattr(linear, part)
            expected = sharding(f"{path}.{part}", x.shape)
            assert x.sharding.is_equivalent_to(expected, x.ndim)
    np.testing.assert_allclose(run(model), run(adapted(base)), atol=1e-5)


BAD_SETTINGS = [
    ({"peft_type": "IA3"}, "peft_type must be among 'LORA'; got 'IA3'"),
    ({"task_type": "SEQ_CLS"}, "task_type must be among 'CAUSAL_LM', None; got"),
    ({"r": 0}, "r must be an integer above 0, got 0"),
    ({"r": 3.0}, "r must be an integer above 0, got 3.0"),
    ({"lora_alpha": None}, "lora_alpha must be a number above 0, got None"),
    ({"use_rslora": "yes"}, "use_rslora must be among True, False, None; got 'yes'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights must be among True, False"),
    ({"use_dora": True}, "use_dora must be off, got True"),
    ({"bias": "lora_only"}, "bias must be off, got 'lora_only'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save must be off, got ['lm_head']"),
    ({"rank_pattern": {"q_proj": 1}}, "rank_pattern must be off, got {'q_proj': 1}"),
    ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern must be off, got"),
    ({"invented_later": 1}, "invented_later must be off, got 1"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_settings_that_are_refused(base, adapter, settings, message):
    change(adapter, **settings)
    with refused(f"{adapter / CONFIG}: {message}"):
        load_model(base, adapter=adapter)


def test_tensors_that_do_not_fit(base, adapter):
    file, whole = adapter / WEIGHTS, load_file(adapter / WEIGHTS)

    def check(edit, message):
        save_file(whole, file)
        rewrite(adapter, edit)
        with refused(f"{file}: {message}"):
            load_model(base, adapter=adapter)

    called = "which adapter_config.json and the model call for"
    check(lambda x: x.pop(UP), f"no tensor {UP} [3, 32], {called}")
    check(
        lambda x: x.update({UP: x[UP][:, :31].copy()}),
        f"tensor {UP} has shape [3, 31], expected [3, 32] by adapter_config.json",
    )
    check(
        lambda x: x.update({UP: x[UP].astype("f8")}),
        f"tensor {UP} has dtype F64, expected one of F32, BF16, F16",
    )
    deep = UP.replace("layers.0", "layers.7")
    check(lambda x: x.update({deep: x[UP]}), f"tensor {deep} is surplus: it is no LoRA")
    head = "base_model.model.lm_head.weight"
    check(lambda x: x.update({head: x[UP]}), f"tensor {head} is surplus")
    change(adapter, target_modules=r".*\.q_proj")
    check(lambda x: x.pop(UP), f"no tensor {UP} [3, 32], {called}")
    check(lambda x: x.clear(), "holds no tensor")


def test_files_that_are_not_there_or_damaged(base, adapter):
    with refused(f"{base}: not a PEFT adapter, no {CONFIG}"):
        load_model(base, adapter=base)
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:-1])
    with refused(f"{adapter / WEIGHTS}: not safetensors, or damaged"):
        load_model(base, adapter=adapter)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with refused(f"{adapter}: expected {WEIGHTS}: adapter_model.bin is a pickle"):
        load_model(base, adapter=adapter)
    (adapter / CONFIG).write_text("[]")
    with refused(f"{adapter / CONFIG}: list; expected a JSON object"):
        load_model(base, adapter=adapter)


def test_not_overwritten(base, tmp_path):
    before = files_below(base)
    with refused(f"{base}: not overwritten, it is neither an empty directory nor one "):
        save_adapter(adapted(base), base, base=base)
    assert files_below(base) == before
    with refused("model: its layers must have LoRA all alike"):
        save_adapter(load_model(base), tmp_path / "new", base=base)
    assert not (tmp_path / "new").exists()


def test_commands(tmp_path, capsys):
    """Merged by convert, or beside the model: the same text."""
    model = write_files(tmp_path)["model"]
    adapter = tmp_path / "adapter"
    save_adapter(adapted(model, ("v_proj", "down_proj")), adapter, base=model)
    flags = [f"--model={model}", f"--adapter={adapter}"]
    convert([*flags, f"--output={tmp_path / 'merged'}"])
    capsys.readouterr()
    texts = []
    for which in (flags, [f"--model={tmp_path / 'merged'}"], flags[:1]):
        generate([*which, "--prompt=12", "--max-new-tokens=20"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    change(adapter, r=2)
    with pytest.raises(SystemExit) as caught:
        convert([*flags, f"--output={tmp_path / 'other'}"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1
    assert "has shape [3, 16], expected [2, 16] by adapter_config.json" in err
    assert not (tmp_path / "other").exists()


def test_load_adapter_keeps_the_frozen_weights(base, adapter):
    model = load_model(base, param_dtype=jnp.bfloat16)
    before = named_parameters(model)
    load_adapter(model, adapter)
    after = named_parameters(model)
    assert all(after[name] is x for name, x in before.items())
    added = [after[name].dtype for name in after.keys() - before.keys()]
    assert set(added) == {jnp.dtype(jnp.float32)} and len(added) == 8
