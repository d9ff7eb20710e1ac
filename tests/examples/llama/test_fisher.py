"""The command that makes the Fisher information of a model."""

import jax
import numpy as np
import pytest
from flax import nnx

from examples.llama.checkpoints.fisher_files import load_fisher
from examples.llama.checkpoints.loading import load_model
from examples.llama.fisher import main
from examples.llama.model.sharding import fisher_sharding, make_mesh
from examples.llama.text.tokenizer import load_tokenizer
from examples.llama.training.fisher import estimate_fisher
from examples.llama.training.own_texts import text_rows, write_texts
from tests.examples.llama.runs import files_below

LENGTH, TEXTS = 24, 6


def make(files, output, *options):
    flags = [f"--model={files['model']}", f"--output={output}", f"--texts={TEXTS}"]
    main([*flags, f"--max-length={LENGTH}", "--seed=3", *options])
    return output


def load(path, model):
    params = nnx.split(model)[1]
    return load_fisher(path, params, fisher_sharding(make_mesh("fsdp=1")))


@pytest.fixture(scope="module")
def model(files):
    return load_model(files["model"])


@pytest.fixture(scope="module")
def made(files, tmp_path_factory):
    return make(files, tmp_path_factory.mktemp("made") / "fisher", "--mesh=fsdp=1")


@pytest.mark.parametrize("dense", [False, True])
def test_of_the_texts_that_the_model_writes(files, made, model, tmp_path, dense):
    """In two steps: texts first, then their gradients."""
    if dense:
        made = make(files, tmp_path / "fisher", "--mesh=fsdp=1", "--dense")
    found, origin = load(made, model)
    assert (origin.model, origin.texts, origin.max_length) == ("model", TEXTS, LENGTH)
    assert (origin.seed, origin.temperature) == (3, 1.0)
    tokenizer = load_tokenizer(files["model"])
    texts = write_texts(model, tokenizer, TEXTS, LENGTH, seed=3)
    rows = text_rows(texts, LENGTH, tokenizer.pad_id)
    mesh = make_mesh("fsdp=1")
    graph, params = nnx.split(model)
    expected = estimate_fisher(
        graph, params, rows, TEXTS, mesh, seed=3, factored=not dense
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all((x >= 0).all() for x in jax.tree.leaves(found))
    assert any((x > 0).any() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("dense", [False, True])
def test_on_a_mesh(files, made, model, tmp_path, dense):
    """Eight devices give what one gives, within rounding, and the same file again."""
    options = ["--mesh=fsdp=4,tensor=2", *(["--dense"] if dense else [])]
    output = make(files, tmp_path / "fisher", *options)
    before = output.read_bytes()
    assert make(files, output, *options).read_bytes() == before  # a file of ours
    if not dense:
        found, expected = (jax.tree.leaves(load(x, model)[0]) for x in (output, made))
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * float(y.max()))


def test_low_precision(files, made, model, tmp_path):
    options = ("--dtype=bfloat16", "--param-dtype=bfloat16", "--mesh=fsdp=1")
    found, _ = load(make(files, tmp_path / "fisher", *options), model)
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float32")}


def test_says_what_it_wrote(files, tmp_path, capsys):
    output = make(files, tmp_path / "new" / "fisher", "--mesh=fsdp=1")
    out, err = capsys.readouterr()
    assert out == f"{output}\n" and f"{TEXTS}/{TEXTS}" in err
    assert [x.name for x in output.parent.iterdir()] == ["fisher"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--texts=0"], "texts must be 1 or above, got 0"),
        (["--max-length=1"], "max_length must be 2 or above, got 1"),
        (["--max-length=65"], "max_length must be up to the model's 64, got 65"),
        (["--seed=-1"], "seed must be 0 to"),
        (["--dtype=float16"], "dtype must be float32 or bfloat16 on CPUs"),
        (["--mesh=x"], "mesh must look like"),
        (["--model=absent"], "'absent'"),
        (["--output=."], ".: not overwritten, it is no file of python -m examples"),
    ],
)
def test_what_is_refused(files, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("notes")
    before = files_below(tmp_path)
    with pytest.raises(SystemExit) as caught:
        make(files, "fisher", *flags)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("fisher: ") and message in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        make(files, "notes")
    assert "notes: not overwritten" in capsys.readouterr().err
    assert files_below(tmp_path) == before
