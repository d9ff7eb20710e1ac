"""Meshes, the rule table, and training on a mesh as on one device."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from examples.llama.model.llama import Llama
from examples.llama.model.parameters import named_parameters
from examples.llama.model.sharding import (
    batch_rows,
    make_mesh,
    parameter_sharding,
    partition,
    put_batch,
)
from examples.llama.training.loop import train
from examples.llama.training.optimizers import make_optimizer
from examples.llama.training.steps import init_state
from examples.programs import collectives
from tests.examples.llama.runs import CONFIG, config_of, metrics_of


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("fsdp=4,tensor=2", (1, 4, 2)),
        (" tensor=2 , data=3", (3, 1, 2)),
        ("fsdp=-1", (1, 8, 1)),
        ("fsdp=-1,tensor=2", (1, 4, 2)),
        ("data=-1,tensor=3", (2, 1, 3)),
        ("fsdp=1", (1, 1, 1)),
    ],
)
def test_mesh(text, shape):
    mesh = make_mesh(text)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert batch_rows(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp", "sizes above 0, or -1; got 'fsdp'"),
        ("fsdp=0", "sizes above 0, or -1; got 'fsdp=0'"),
        ("model=2", "data, fsdp, tensor, each once; got 'model=2'"),
        ("fsdp=2,fsdp=4", "each once; got"),
        ("fsdp=-1,data=-1", "at most one of them -1"),
        ("fsdp=16", "has 16 devices, found 8"),
        ("fsdp=-1,tensor=9", "has 9 devices, found 8"),
        ("", "got ''"),
    ],
)
def test_bad_mesh(text, message):
    with pytest.raises(ValueError, match="mesh") as caught:
        make_mesh(text)
    assert message in str(caught.value)


def test_rules():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    abstract = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
    sharding = parameter_sharding(mesh)
    found = {
        name: sharding(name, x.shape).spec
        for name, x in named_parameters(abstract).items()
    }
    fsdp, tensor = ("fsdp",), ("tensor",)
    layer = {
        "input_layernorm.scale": P(None),
        "self_attn.q_proj.kernel": P(fsdp, tensor),
        "self_attn.k_proj.kernel": P(fsdp, tensor),
        "self_attn.v_proj.kernel": P(fsdp, tensor),
        "self_attn.o_proj.kernel": P(tensor, fsdp),
        "post_attention_layernorm.scale": P(None),
        "mlp.gate_proj.kernel": P(fsdp, tensor),
        "mlp.up_proj.kernel": P(fsdp, tensor),
        "mlp.down_proj.kernel": P(tensor, fsdp),
    }
    assert found == {
        "embed_tokens.embedding": P(tensor, fsdp),
        "norm.scale": P(None),
        **{f"layers.0.{name}": spec for name, spec in layer.items()},
    }
    assert sharding("lm_head.kernel", (16, 260)).spec == P(fsdp, tensor)
    assert sharding("layers.3.mlp.up_proj.lora_a", (16, 4)).spec == P(fsdp, None)
    assert sharding("layers.3.mlp.up_proj.lora_b", (4, 24)).spec == P(None, tensor)
    assert partition(mesh, ("batch", None), (8, 3)) == P(("data", "fsdp"), None)
    # What an axis does not divide stays whole.
    assert sharding("lm_head.kernel", (16, 261)).spec == P(fsdp, None)


def test_batches():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    batch = {"tokens": np.arange(24).reshape(8, 3), "row": np.arange(8)}
    whole, parts = put_batch(batch, mesh), put_batch(batch, mesh, 2)
    for name, x in batch.items():
        np.testing.assert_array_equal(whole[name], x)
        np.testing.assert_array_equal(parts[name], x.reshape(2, 4, *x.shape[1:]))
        assert whole[name].addressable_shards[0].data.shape[0] == 2
        assert parts[name].addressable_shards[0].data.shape[:2] == (2, 1)


@pytest.fixture(scope="module")
def one_device(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "one"
    train(config_of(files, output, batch_size=8, steps=6), progress=False)
    return metrics_of(output)


@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "data=4,fsdp=2"])
def test_training_on_eight_devices(files, one_device, tmp_path, mesh):
    """The losses of one device, and the exported model can be read."""
    config = config_of(files, tmp_path / "run", batch_size=8, steps=6, mesh=mesh)
    train(config, progress=False)
    found = metrics_of(tmp_path / "run")
    for line, expected in zip(found, one_device, strict=True):
        assert line == pytest.approx(expected, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["mofo", "mofo-lion"])
def test_the_optimizer_gathers_nothing(files, tmp_path, method):
    config = config_of(files, tmp_path, method=method, alpha=0.1)
    mesh = make_mesh("fsdp=4,tensor=2")
    sharding = parameter_sharding(mesh)
    params = nnx.state(Llama(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)
    names = named_parameters(params)
    placed = {n: jax.device_put(x, sharding(n, x.shape)) for n, x in names.items()}
    flat, tree = jax.tree.flatten(params)
    params = jax.tree.unflatten(tree, list(placed.values()))
    assert [x.shape for x in flat] == [x.shape for x in placed.values()]
    optimizer = make_optimizer(config)
    state = init_state(optimizer, params, mesh)

    @jax.jit
    def update(gradients, opt_state, params):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(
                gradients, opt_state, params, learning_rate=np.float32(0.5)
            )

    moved = collectives(
        update.lower(params, state.opt_state, params).compile().as_text()
    )
    assert moved
    for collective in moved:
        assert collective.kind == "all-reduce"
        for _, shape in collective.arrays:
            assert np.prod(shape) <= 64, collective.line
    # Moments lie where their parameters do.
    moments = jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))
    for moment, parameter in zip(moments, jax.tree.leaves(params), strict=True):
        assert moment.sharding == parameter.sharding
    assert any(not x.sharding.is_fully_replicated for x in moments)
