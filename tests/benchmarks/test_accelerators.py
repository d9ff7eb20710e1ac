"""The compiled programs are counted right, and the benchmark resumes."""

import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks import accelerators, ahead, recorded_passes
from benchmarks.accelerators import CASES, METHODS, main
from benchmarks.accelerators_report import ratios, table
from examples import programs
from examples.programs import describe, dtype_bytes

ROOT = Path(__file__).parents[2]
TPU = ROOT / "build" / "tpu" / "bin" / "python"
PASSES = {
    "momentum": {"one matrix": 4.0, "layers": 6.0},
    "gain": {"one matrix": 5.0, "layers": 7.0},
}


def described(function, *arguments):
    return describe(jax.jit(function).lower(*arguments).compile())


def test_kernels_and_bytes():
    x = jnp.ones((1000,))
    found = described(lambda x, y: jnp.sin(x) + y, x, x)
    assert found["step"] == {"cycles": None, "kernels": 1, "bytes": 3 * 4000}
    assert found["pass"] == {"cycles": None, "kernels": 0, "bytes": 0}
    assert (found["collectives"], found["temporary_bytes"]) == (0, 0)


def test_loops():
    """Those of a known length count as often as they run, the search's is a pass."""
    x = jnp.ones((1000,))
    once = described(lambda x: jnp.sin(x), x)["step"]["kernels"]
    many = described(lambda x: jax.lax.fori_loop(0, 7, lambda _, y: jnp.sin(y), x), x)
    assert many["pass"]["kernels"] == 0
    assert 7 * once <= many["step"]["kernels"] <= 30

    def until(x):
        return jax.lax.while_loop(lambda y: y[0] > 0.1, jnp.sin, x)

    searching = described(jax.jit(until), x)
    assert searching["pass"]["kernels"] == 0
    assert searching["turn"]["kernels"] >= 1
    assert searching["turn"]["bytes"] >= 2 * 4000

    @jax.jit
    def search_masks(x):
        return until(x)

    renamed = described(search_masks, x)
    assert renamed["pass"] == searching["turn"]
    assert renamed["turn"]["kernels"] == 0


def test_sizes_of_types():
    names = ("f32", "bf16", "s8", "u4", "pred", "token", "f8e4m3fn", "c64")
    assert [dtype_bytes(name) for name in names] == [4, 2, 1, 1, 1, 0, 1, 8]
    text = "(f32[4,2]{1,0:T(8,128)}, bf16[3]{0:T(1024)S(1)}, s32[])"
    assert programs._arrays(text) == [32, 0, 4]


@pytest.mark.parametrize("method", METHODS)
def test_optimizers_steps(monkeypatch, method):
    """On eight devices, each method's program, and its search if it has one."""
    shapes = {"w": (64, 32), "v": (6, 32), "b": (32,)}
    monkeypatch.setitem(ahead.TREES, "toy", shapes)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    with jax.numpy_dtype_promotion("standard"):
        found = describe(ahead.compile_step(method, "toy", mesh))
    assert found["step"]["kernels"] > 0
    assert (found["pass"]["kernels"] > 0) == (method != "adamw")
    assert (found["collectives"] > 0) == (method != "adamw")
    assert (found["collective_bytes"] > 0) == (method != "adamw")


def write_gradients(directory, steps):
    draw = np.random.default_rng(0)
    shapes = {"layers_0_a_kernel": (24, 16), "layers_0_b_kernel": (8, 8)}
    for step in range(steps):
        for name, shape in shapes.items():
            gradient = draw.normal(size=shape).astype(np.float32)
            np.save(directory / f"{name}.{step}.npy", gradient)


def test_passes_of_recorded_gradients(tmp_path):
    write_gradients(tmp_path, 6)
    found = recorded_passes.replay(tmp_path, "TPUs")
    assert found.keys() == PASSES.keys()
    for passes in found.values():
        assert 1 <= passes["one matrix"] <= passes["layers"] < 40


def program(case, method):
    factor = 1 + METHODS.index(method)
    costs = {"cycles": 100 * factor, "kernels": factor, "bytes": 10}
    none = {"cycles": None, "kernels": 0, "bytes": 0}
    return {
        "step": costs,
        "pass": none if method == "adamw" else costs,
        "collectives": 0,
        "collective_bytes": 0,
        "temporary_bytes": 0,
        "seconds": 1.0,
    }


def test_runs_are_kept(tmp_path, monkeypatch, capsys):
    calls = []

    def compiled(_, case, method):
        calls.append((case, method))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return program(case, method)

    monkeypatch.setattr(accelerators, "_compile", compiled)
    monkeypatch.setattr(accelerators, "smollm2_path", lambda: None)
    monkeypatch.setattr(recorded_passes, "measure", lambda *_: PASSES)
    path = tmp_path / "new" / "results.json"
    argv = ["--platform", "tpu", "--output", str(path), "--python", "none"]
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    assert len(json.loads(path.read_text())["programs"]) == 6
    monkeypatch.setattr(recorded_passes, "measure", None)  # not to be called again
    main(argv)
    assert len(calls) == 1 + len(METHODS) * len(CASES["tpu"])
    results = json.loads(path.read_text())
    over = {(tuple(r["case"]), r["method"]): ratio for r, ratio, _ in ratios(results)}
    leaf, tree = CASES["tpu"][:2]
    assert over[leaf, "adamw"] == 1
    assert over[leaf, "mofo"] == 2 + 2 * PASSES["momentum"]["one matrix"]
    assert over[tree, "keep"] == 4 + 4 * PASSES["gain"]["layers"]
    assert table(results) == path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_documents_quote_the_results():
    path = ROOT / "docs" / "results" / "accelerators_tpu.json"
    results = json.loads(path.read_text())
    over = {
        (run["case"][0], run["case"][-1]): ratio
        for run, ratio, _ in ratios(results)
        if run["method"] == "mofo"
    }
    leaf, tiny = over["v5e", "one 4096x4096 leaf"], over["v5e", "TinyLlama"]
    for name in ("README.md", "docs/selection.md"):
        text = " ".join((ROOT / name).read_text().split())
        assert f"{leaf:.2f} times AdamW's" in text and f"{tiny:.2f} times" in text


def test_documents_quote_the_kernels():
    path = ROOT / "docs" / "results" / "accelerators_gpu.json"
    found = {
        run["method"]: (run, *both)
        for run, *both in ratios(json.loads(path.read_text()))
        if run["case"][-1] == "TinyLlama"
    }
    run, kernels, moved = found["mofo"]
    for name in ("README.md", "docs/selection.md"):
        text = " ".join((ROOT / name).read_text().split())
        assert f"{kernels:.1f} times as many" in text
        assert f"{moved:.1f} times as many bytes" in text
    assert f"{run['step']['kernels']} kernels and {run['pass']['kernels']} in" in text
    assert f"AdamW's {found['adamw'][0]['step']['kernels']} in all" in text
    assert f"`keep` has {found['keep'][0]['step']['kernels']} outside" in text


def test_what_does_not_fit(monkeypatch, capsys):
    def compile_step(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 of 16 GB\nmore")

    monkeypatch.setattr(ahead, "compile_step", compile_step)
    monkeypatch.setattr(ahead, "devices", lambda *_: jax.devices())
    ahead.main("tpu", "v5e:2x2", 1, "TinyLlama", "mofo")
    found = json.loads(capsys.readouterr().out)
    assert found == {"does_not_fit": "RESOURCE_EXHAUSTED: 17 of 16 GB"}
    case = CASES["tpu"][1]
    runs = [{"case": case, "method": "adamw"} | program(case, "adamw")]
    runs += [{"case": case, "method": "mofo"} | found]
    results = {"settings": {"platform": "tpu"}, "passes": PASSES, "versions": {}}
    results["programs"] = runs
    assert "| 4 x v5e | TinyLlama | mofo | does not fit | |" in table(results)
    assert len(list(ratios(results))) == 1


def test_a_compiler_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerators, "smollm2_path", lambda: None)
    monkeypatch.setattr(recorded_passes, "measure", lambda *_: PASSES)
    argv = ["--platform", "gpu", "--output", str(tmp_path / "x.json")]
    with pytest.raises(SystemExit, match="2"):
        main([*argv, "--python", "/bin/false"])
    message = "/bin/false cannot compile adamw for 1 x H100: it says nothing"
    assert f"accelerators: {message}" in capsys.readouterr().err


@pytest.mark.skipif(not TPU.exists(), reason="needs make accelerators")
def test_cycles_of_a_tpu(monkeypatch):
    environment = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    environment |= {"TPU_WORKER_HOSTNAMES": "localhost"}
    environment |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    command = [TPU, "-m", "benchmarks.ahead", "tpu", "v5e:2x2", "1"]
    found = {}
    for method in ("adamw", "mofo"):
        run = subprocess.run(
            [*command, "one 4096x4096 leaf", method],
            env=environment, cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
        found[method] = json.loads(run.stdout.splitlines()[-1])
    assert 0.9e6 < found["adamw"]["step"]["cycles"] < 1.2e6
    assert found["adamw"]["step"]["bytes"] == pytest.approx(7 * 4 * 4096**2, rel=1e-3)
    assert found["mofo"]["pass"]["cycles"] > 0.1e6
