"""Checkpoints of training: what comes back, and what is said when they fail."""

import gc
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from examples.llama.model.sharding import make_mesh, replicated
from examples.llama.training.checkpoint import Checkpoints, check_space
from examples.llama.training.steps import init_state
from mofo_jax import mofo
from tests.examples.llama.model.test_llama import make

# TensorStore leaves behind tasks whose errors nobody fetches, to be found much later.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()  # here, where such errors do not matter


@pytest.fixture
def state():
    mesh = make_mesh("fsdp=2")
    params = nnx.state(make(param_dtype=jnp.bfloat16), nnx.Param)
    params = jax.device_put(params, replicated(mesh))
    return init_state(mofo(1e-3, 0.1), params, mesh)


def test_round_trip(tmp_path, state):
    odd = jnp.asarray([-0.0, 1e-38, jnp.inf, jnp.nan] * 8, jnp.bfloat16)
    scale = state.params["norm"]["scale"]
    scale[...] = jax.device_put(odd, scale[...].sharding)
    with_position = {"next_index": 12345}
    first = Checkpoints(tmp_path, keep=2)
    first.save(3, state, with_position)
    first.finish()
    first.close()
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest == 3 and str(tmp_path / "3") in again.where()
    like = jax.tree.map(jnp.zeros_like, state)
    step, restored, data = again.restore(like)
    assert (step, data) == (3, with_position)
    leaves = (jax.tree.leaves_with_path(s) for s in (state, restored))
    for (path, a), (_, b) in zip(*leaves, strict=True):
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
    again.close()


def test_moves_to_another_mesh(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    checkpoints.finish()
    sharding = NamedSharding(make_mesh("fsdp=4"), PartitionSpec())
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    restored = checkpoints.restore(like).state
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert len(b.sharding.device_set) == 4
    checkpoints.close()


def test_keeps_the_last(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest is None
    assert checkpoints.where() == "there is no checkpoint yet"
    for step in (2, 4, 6, 7):
        checkpoints.save(step, state, {})
    checkpoints.finish()
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"6", "7"}


def test_another_model(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(2, state, {})
    checkpoints.finish()
    params = nnx.state(make(num_hidden_layers=3), nnx.Param)
    other = init_state(optax.adamw(1e-3), params, make_mesh("fsdp=1"))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / '2'}: cannot be")):
        checkpoints.restore(other)
    checkpoints.close()


def test_damaged(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(2, state, {})
    checkpoints.finish()
    checkpoints.close()
    for path in (tmp_path / "2" / "state").rglob("*"):
        if path.is_file() and path.name != "_METADATA" and path.stat().st_size > 500:
            path.write_bytes(path.read_bytes()[:200])
    again = Checkpoints(tmp_path, keep=2)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / '2'}: cannot be")):
        again.restore(state)
    again.close()


def flip_a_bit(directory, rng):
    """Of the largest file of a checkpoint's arrays."""
    path = max(directory.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content) // 4, len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


def test_a_flipped_bit(tmp_path, state):
    """The run resumes from the checkpoint before, and the damaged one is kept apart."""
    directory, rng = tmp_path / "checkpoints", random.Random(0)
    damaged = 0
    for step in range(2, 14):
        checkpoints = Checkpoints(directory, keep=2)
        checkpoints.save(step - 1, state, {"step": step - 1})
        checkpoints.save(step, state, {"step": step})
        checkpoints.finish()
        checkpoints.close()
        flip_a_bit(directory / str(step) / "state", rng)
        again = Checkpoints(directory, keep=2)
        warnings = []
        found = again.restore(state, warn=warnings.append)
        again.close()
        damaged += found.step == step - 1
        if found.step == step - 1:
            assert found.data == {"step": step - 1}
            assert re.match(re.escape(f"{directory / str(step)}: "), warnings[0])
            assert "resuming from an earlier checkpoint" in warnings[0]
            assert (tmp_path / "checkpoints_aside" / str(step)).is_dir()
            assert not (directory / str(step)).exists()
        same = jax.tree.map(
            lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
            state, found.state,
        )  # fmt: skip
        assert all(jax.tree.leaves(same))  # whatever was hit, nothing else comes back
        shutil.rmtree(tmp_path, ignore_errors=True)
    assert damaged > 6  # the others hit bytes that say nothing of the arrays


def test_all_damaged(tmp_path, state):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2):
        checkpoints.save(step, state, {})
    checkpoints.finish()
    for step in (1, 2):
        for path in (tmp_path / "checkpoints" / str(step) / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "checkpoints/2"))):
        checkpoints.restore(state)
    checkpoints.close()
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_resumes_from_an_earlier_step(tmp_path, state):
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, keep=3)
    for step in (2, 4, 6):
        checkpoints.save(step, state, step)
    checkpoints.finish()
    message = f"resume_from must be a step of a checkpoint in {directory}, 2, 4, 6;"
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoints.restore(state, step=5)
    found = checkpoints.restore(state, step=4)
    assert found.step == checkpoints.latest == found.data == 4
    assert [path.name for path in (tmp_path / "checkpoints_aside").iterdir()] == ["6"]
    checkpoints.save(6, state, {})  # its own
    checkpoints.finish()
    assert checkpoints.latest == 6
    checkpoints.close()


def test_no_checkpoint_yet(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.restore(state) is None
    with pytest.raises(ValueError, match=r"resume_from must be .*, none; got 3"):
        checkpoints.restore(state, step=3)
    checkpoints.close()


def test_no_room(tmp_path, state):
    check_space(tmp_path / "new" / "run", state, 2)
    huge = np.broadcast_to(np.float32(0), (1 << 50,))  # of no memory
    message = r"2 checkpoints and one on the way need \d+\.\d GB, \d+\.\d GB are free"
    with pytest.raises(OSError, match=message):
        check_space(tmp_path / "new" / "run", [huge], 2)
    assert not list(tmp_path.iterdir())


PROGRAM = """
import errno, json, os, resource, sys
import jax, jax.numpy as jnp
from pathlib import Path
from examples.llama.training.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
state = {"x": jnp.arange(1 << 20, dtype=jnp.float32)}
checkpoints.save(1, state, {})
checkpoints.finish()
mkdir = os.mkdir

def full(path, *args, **kwargs):
    if "/2." in str(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    mkdir(path, *args, **kwargs)

if sys.argv[2] == "directory":
    os.mkdir = full
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
try:
    checkpoints.save(2, {"x": jax.random.normal(jax.random.key(0), (1 << 20,))}, {})
    checkpoints.finish()
except OSError as error:
    print(json.dumps([str(error), checkpoints.where()]))
"""


@pytest.mark.parametrize("what", ["directory", "bytes"])
def test_a_write_that_fails(tmp_path, what):
    """The disk is full. The checkpoint before is intact and named, the process ends."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), what],
        cwd=Path(__file__).parents[4], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    message, where = json.loads(result.stdout.splitlines()[-1])
    assert message.startswith(f"{tmp_path}: a checkpoint cannot be written: ")
    assert where == f"the last good checkpoint is {tmp_path / '1'}"
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest == 1
    like = {"x": jnp.zeros(1 << 20)}
    restored = checkpoints.restore(like).state
    np.testing.assert_array_equal(restored["x"], np.arange(1 << 20, dtype=np.float32))
    checkpoints.close()
