"""The notebooks, each run from top to bottom on a tiny model, and how they look."""

import json
import re
import tomllib

import pytest

from tests.examples.llama.evaluation.harness_tasks import write_tasks
from tests.examples.llama.runs import write_files
from tests.notebooks.execute import NAMES, NOTEBOOKS, clean, execute, read
from tests.notebooks.hub import serve

ROOT = NOTEBOOKS.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    """Of the notebooks that fine-tune: a tiny model and its data."""
    root = tmp_path_factory.mktemp("data")
    found = write_files(root)
    return {
        "MODEL": str(found["model"]),
        "DATA": found["data"][0],
        "EVAL_DATA": found["eval_data"],
        "STEPS": 10,
        "BATCH_SIZE": 8,
        "ACCUMULATE": 1,
        "MAX_LENGTH": 48,
    }


def write_wikitext(directory):
    """A directory of that name is loaded, instead of the data set of the hub."""
    path = directory / "Salesforce/wikitext"
    path.mkdir(parents=True)
    lines = [json.dumps({"text": "the cat sat on the mat. \n"}) for _ in range(12)]
    (path / "test.jsonl").write_text("\n".join(lines))
    (path / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        "  - split: test\n    path: test.jsonl\n---\n"
    )


def shown(notebook):
    """What the cells show: texts, and how many pictures."""
    outputs = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    texts = []
    for output in outputs:
        data = output.get("data", {})
        texts += [output.get("text", ""), *map(data.get, ("text/plain", "text/html"))]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(filter(None, texts)), pictures


@pytest.mark.slow
def test_quickstart(tmp_path):
    text, pictures = shown(execute("quickstart", {"STEPS": 2}, tmp_path))
    assert "115 of 1152 entries moved" in text and pictures == 2
    runs = json.loads((tmp_path / "runs/quickstart/quickstart.json").read_text())
    assert len(runs["runs"]) == 15 and "keep 10%" in text


@pytest.mark.slow
def test_finetune_on_gpu(tmp_path, parameters):
    write_wikitext(tmp_path)
    rates = {"adamw": 1e-2, "mofo": 2e-2}
    more = {"LEARNING_RATES": rates, "NEW_TOKENS": 5}
    text, pictures = shown(execute("finetune_llama_gpu", parameters | more, tmp_path))
    assert pictures == 2
    for method in rates:
        assert (tmp_path / "runs/gpu" / method / "model/model.safetensors").exists()
    row = re.compile(r"^(\w+) +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)
    rows = row.findall(text)
    table = {name: [float(x) for x in values] for name, *values in rows}
    before, *after = table["eval_loss"]
    assert max(after) < before
    # The same cells again, as after a runtime was lost, take what is there.
    again, _ = shown(execute("finetune_llama_gpu", parameters | more, tmp_path))
    assert row.findall(again) == rows


@pytest.mark.slow
def test_finetune_on_tpu_and_push(tmp_path, parameters, monkeypatch):
    """On eight simulated devices, and to a hub on this machine."""
    write_wikitext(tmp_path)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    text = "".join(f"Then cat number {i} sat on a mat of them.\n" for i in range(99))
    more = {
        "LEARNING_RATE": 1e-2,
        "TASKS": "stories_choice,stories_letter",
        "TASK_FILES": str(write_tasks(tasks, text)),
        "LIMIT": 3,
        "REPO_ID": "someone/tuned",
    }
    with serve() as (address, repositories):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        notebook = execute("finetune_llama_tpu", parameters | more, tmp_path)
    text, pictures = shown(notebook)
    assert "8 devices" in text and "'fsdp': 8" in text and "pushed to" in text
    assert pictures == 2
    model = tmp_path / "runs/tpu/model"
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    pushed = repositories["someone/tuned"]
    assert pushed == files and "model.safetensors" in files


@pytest.mark.slow
def test_frontier(tmp_path, parameters):
    data = tmp_path / "data"
    data.mkdir()
    (data / "retain.txt").write_text("the cat sat on the mat. " * 12)
    model = parameters["MODEL"]
    for name, path in {
        "stories260K.bin": model,
        "tok512.bin": model,
        "gsm8k_train.jsonl": parameters["DATA"],
        "gsm8k_test.jsonl": parameters["EVAL_DATA"],
        "tinystories_excerpt.txt": data / "retain.txt",
    }.items():
        (data / name).symlink_to(path)
    small = {
        "DATA_DIR": str(data),
        "METHODS": ("adamw", "mofo"),
        "STEPS": 2,
        "EVAL_RECORDS": 4,
        "MAX_LENGTH": 48,
    }
    _, pictures = shown(execute("forgetting_frontier", small, tmp_path))
    assert pictures == 1
    assert len(json.loads((tmp_path / "runs/frontier.json").read_text())["runs"]) == 10


@pytest.mark.parametrize("name", NAMES)
def test_ready_for_colab(name):
    notebook = read(name)
    title, install, settings = notebook.cells[:3]
    address = REPOSITORY.removeprefix("https://")
    colab = f"https://colab.research.google.com/{address.replace('.com', '')}"
    assert f"]({colab}/blob/main/notebooks/{name}.ipynb)" in title.source
    assert install.source.startswith("# Colab: ")
    assert f"!git clone --quiet --depth 1 {REPOSITORY}\n" in install.source
    extras = re.search(r"-e '\.\[([\w,]+)\]'", install.source)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert "parameters" in settings.metadata.tags
    text, pictures = shown(notebook)
    assert pictures >= 1
    assert not re.findall(r"(?<![\w./:])/[\w.-]+/[\w./-]+", text)


@pytest.mark.parametrize("name", NAMES)
def test_links(name):
    """To what the repository has, and to notebooks beside."""
    text = "".join(c.source for c in read(name).cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\((.*?)\)", text):
        if target.startswith(REPOSITORY):
            assert (ROOT / target.removeprefix(f"{REPOSITORY}/blob/main/")).exists()
        elif not target.startswith("https://"):
            assert (NOTEBOOKS / target).exists()


def test_clean(tmp_path):
    notebook = read("quickstart")
    output = {"output_type": "stream", "name": "stdout", "text": f"{tmp_path}/a/b"}
    warning = output | {"name": "stderr", "text": "/usr/lib/x.py: a warning\n50%|### |"}
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs = [type(cell)(output), type(cell)(warning)]
    clean(notebook, tmp_path)
    assert [x.text for x in cell.outputs] == ["a/b", "50%|### |"]
