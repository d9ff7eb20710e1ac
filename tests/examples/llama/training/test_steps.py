"""The training step by hand: loss, gradient, parts of a batch, packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples.llama.model.lora import add_lora, lora_layers
from examples.llama.model.sharding import make_mesh, put_batch, replicated
from examples.llama.training.steps import Fixed, compile_step, init_state, make_step
from tests.examples.llama.model.test_llama import CONFIG, make

L = 16


def batch_of(rows, seed=0):
    """Rows of different lengths, with few or many counted tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, L + 1, size=rows)
    inside = np.arange(L) < lengths[:, None]
    counted = inside & (np.arange(L) >= rng.integers(1, 4, size=(rows, 1)))
    counted[0, 2:] = False  # one row that hardly counts
    counted[0, 1] = True
    return {
        "tokens": rng.integers(CONFIG.vocab_size, size=(rows, L), dtype=np.int32),
        "loss_mask": counted,
        "segment_ids": inside.astype(np.int32),
        "positions": np.broadcast_to(np.arange(L, dtype=np.int32), (rows, L)),
    }


def run(
    batch, parts=1, packed=False, mesh="fsdp=1", steps=1, seed=None, first=0, **options
):
    """The state and metrics after steps of SGD, whose learning rate of 1 is its own.

    With a seed, of LoRA with dropout.
    """
    mesh, model = make_mesh(mesh), make(**options)
    if seed is not None:
        add_lora(model, 4, 8.0, rngs=nnx.Rngs(0), dropout=0.3)
        for linear in lora_layers(model).values():
            linear.lora_b[...] += 0.1
    kind = nnx.Param if seed is None else nnx.LoRAParam
    graph, params, frozen = nnx.split(model, kind, ...)
    params = jax.device_put(params, replicated(mesh))
    optimizer = optax.sgd(1.0)
    state = init_state(optimizer, params, mesh)
    step = make_step(graph, optimizer, packed=packed)
    placed = put_batch(batch, mesh, parts)
    state = state._replace(step=state.step + first)
    dropout_seed = None if seed is None else jnp.uint32(seed)
    fixed = Fixed(frozen, dropout_seed=dropout_seed)
    compiled = compile_step(step, state, fixed, placed, mesh=mesh)
    for _ in range(steps):
        state, metrics = compiled(state, fixed, np.float32(0.125), placed)
    return state, metrics


def plain_loss(state, graph, batch):
    total, count = plain_sum(state, graph, batch)
    return total / count


def plain_sum(state, graph, batch):
    logits = nnx.merge(graph, state)(batch["tokens"])[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["tokens"][:, 1:]
    )
    mask = batch["loss_mask"][:, 1:]
    return jnp.sum(losses, where=mask), jnp.sum(mask, dtype=jnp.float32)


def test_loss_and_gradient():
    batch = batch_of(4)
    graph, params = nnx.split(make(), nnx.Param)
    # Right padding needs no mask: what comes later is not seen.
    loss, gradients = jax.jit(jax.value_and_grad(plain_loss), static_argnums=1)(
        params, graph, {k: jnp.asarray(v) for k, v in batch.items()}
    )
    state, metrics = run(batch)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    norm = float(optax.tree.norm(gradients))
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
    assert int(metrics["tokens"]) == batch["segment_ids"].sum()
    assert metrics["learning_rate"] == 0.125
    assert state.step == 1
    start = jax.tree.leaves(nnx.state(make(), nnx.Param))
    for p, g, after in zip(
        start, jax.tree.leaves(gradients), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(p - g, after, atol=2e-5)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_parts_equal_the_batch(parts, param_dtype):
    """Also where one part has one counted token and another has dozens."""
    batch = batch_of(8)
    counts = batch["loss_mask"].reshape(parts, -1).sum(axis=1)
    assert counts.min() < 0.8 * counts.max()
    whole, expected = run(batch, param_dtype=param_dtype)
    state, metrics = run(batch, parts, param_dtype=param_dtype)
    tolerance = 1e-5 if param_dtype == jnp.float32 else 2e-2
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=tolerance)
    leaves = (jax.tree.leaves(s.params) for s in (state, whole))
    for found, other in zip(*leaves, strict=True):
        assert found.dtype == other.dtype == param_dtype
        found, other = (np.asarray(x, np.float64) for x in (found, other))
        np.testing.assert_allclose(found, other, atol=tolerance)


def test_packed_rows_equal_separate_ones():
    apart = batch_of(4, seed=1)
    lengths = apart["segment_ids"].sum(axis=1)
    total = int(lengths.sum())
    rows = [
        {name: x[i, :n] for name, x in apart.items()} for i, n in enumerate(lengths)
    ]
    packed = {name: np.concatenate([r[name] for r in rows])[None] for name in apart}
    packed["segment_ids"] = np.repeat(np.arange(1, 5, dtype=np.int32), lengths)[None]
    assert packed["tokens"].shape == (1, total)
    whole, expected = run(apart)
    state, metrics = run(packed, packed=True)
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4), name
    leaves = (jax.tree.leaves(s.params) for s in (state, whole))
    for found, other in zip(*leaves, strict=True):
        np.testing.assert_allclose(found, other, atol=1e-4)


def test_state_keeps_its_types_and_learns():
    state, first = run(batch_of(4))
    again, later = run(batch_of(4), steps=5)
    assert float(later["loss"]) < float(first["loss"])
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_batch_that_counts_nothing():
    batch = batch_of(2)
    batch["loss_mask"] = np.zeros_like(batch["loss_mask"])
    _, metrics = run(batch)
    assert metrics["loss"] == 0 and metrics["gradient_norm"] == 0


def test_low_precision_computation():
    _, exact = run(batch_of(4))
    state, metrics = run(batch_of(4), dtype=jnp.bfloat16)
    assert float(metrics["loss"]) == pytest.approx(float(exact["loss"]), rel=0.03)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_soft_targets_and_kl():
    """Some tokens count by cross-entropy, some by the divergence, some by both."""
    mesh, batch = make_mesh("fsdp=1"), batch_of(4)
    rng = np.random.default_rng(3)
    weight = rng.choice(np.float32([0, 0, 0.5, 1]), size=batch["loss_mask"].shape)
    batch["kl_weight"] = weight
    graph, params = nnx.split(make())
    other = jax.tree.map(lambda x: x * 1.5, params)
    params, other = jax.device_put((params, other), replicated(mesh))
    optimizer = optax.sgd(1.0)

    def expected(params):
        total, _ = plain_sum(params, graph, batch)
        log_q, log_p = (
            jax.nn.log_softmax(nnx.merge(graph, p)(batch["tokens"])[:, :-1])
            for p in (params, other)
        )
        divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        counted = batch["loss_mask"][:, 1:] | (weight[:, 1:] > 0)
        total += jnp.sum(divergence * weight[:, 1:])
        return total / counted.sum().astype(np.float32)

    value, gradients = jax.jit(jax.value_and_grad(expected))(params)
    norm = float(optax.tree.norm(gradients))
    state = init_state(optimizer, params, mesh)
    step = make_step(graph, optimizer, packed=False, reference=graph)
    placed = put_batch(batch, mesh, 2)
    fixed = Fixed(nnx.State({}), other)
    _, metrics = compile_step(step, state, fixed, placed, mesh=mesh)(
        state, fixed, np.float32(0), placed
    )
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-4)


def test_projection_gets_the_other_batches_gradients():
    mesh, batches = make_mesh("fsdp=1"), [batch_of(4, seed) for seed in range(3)]
    graph, params = nnx.split(make())
    params = jax.device_put(params, replicated(mesh))
    optimizer = optax.sgd(1.0)
    state = init_state(optimizer, params, mesh)

    def project(own, theirs):
        assert len(theirs) == 2
        return jax.tree.map(lambda _, a, b: a - 2 * b, own, *theirs)

    step = make_step(graph, optimizer, packed=False, project=project)
    batch, *others = [put_batch(x, mesh, 1) for x in batches]
    fixed = Fixed(nnx.State({}))
    compiled = compile_step(step, state, fixed, batch, others, mesh=mesh)
    gradients = [
        jax.jit(jax.grad(plain_loss), static_argnums=1)(
            params, graph, {k: jnp.asarray(v) for k, v in x.items()}
        )
        for x in batches
    ]
    expected = jax.tree.map(lambda a, b: a - 2 * b, *gradients[1:])
    start = jax.tree.map(np.asarray, params)
    after, _ = compiled(state, fixed, np.float32(0), batch, others)
    for p, g, q in zip(
        *map(jax.tree.leaves, (start, expected, after.params)), strict=True
    ):
        np.testing.assert_allclose(p - g, q, atol=5e-5)


@pytest.mark.slow
def test_dropout_follows_from_seed_and_step():
    batch = batch_of(4)

    def losses(**options):
        options = {"seed": 0, "num_hidden_layers": 1} | options
        state, metrics = run(batch, **options)
        assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
        return float(metrics["loss"])

    one = losses()
    others = losses(first=1), losses(seed=1), losses(parts=2)
    assert len({one, *others}) == 4
    assert max(others) - min(others) < 1
    # On other devices, and computed twice, what is dropped is the same.
    assert losses(remat="full") == pytest.approx(one, rel=1e-5)
    assert losses(mesh="fsdp=2,tensor=2") == pytest.approx(one, rel=1e-4)
