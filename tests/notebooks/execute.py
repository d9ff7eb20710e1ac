"""Run the notebooks from top to bottom and keep what they show.

python -m tests.notebooks.execute --data-dir DIR

Writes outputs into the notebooks, without paths of this machine. Those that need a GPU
or TPU run on simulated devices, with the model and the data that DIR has.
"""

import dataclasses
import itertools
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import tyro
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from examples.llama.convert import Args as ConvertArgs
from examples.llama.convert import convert
from tests.examples.llama.evaluation.harness_tasks import write_tasks

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = (
    "quickstart",
    "forgetting_frontier",
    "finetune_llama_gpu",
    "finetune_llama_tpu",
)


def read(name: str) -> Any:
    """A notebook, as nbformat has it."""
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def execute(name: str, parameters: Mapping[str, Any], directory: Path) -> Any:
    """Runs a notebook from top to bottom with other parameters.

    Args:
      name: Of NAMES.
      parameters: What to assign, by variable, after the cell tagged "parameters".
      directory: Where it runs, and what its relative paths are relative to.

    Returns:
      The notebook with its outputs.

    Raises:
      ValueError: A parameter is none of the notebook's.
      nbclient.exceptions.CellExecutionError: A cell raised.
    """
    notebook = read(name)
    tags = [cell.metadata.get("tags", ()) for cell in notebook.cells]
    (position,) = (i for i, found in enumerate(tags) if "parameters" in found)
    for key in parameters:
        if not re.search(rf"^{key} = ", notebook.cells[position].source, re.MULTILINE):
            raise ValueError(f"{name} has no parameter {key}")
    lines = [f"{key} = {value!r}" for key, value in parameters.items()]
    notebook.cells.insert(position + 1, new_code_cell("\n".join(lines)))
    NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(directory)}},
    ).execute()
    del notebook.cells[position + 1]
    return notebook


def clean(notebook: Any, *places: Path) -> None:
    """Takes from the outputs what tells of this machine, and warnings of packages.

    Of what went to stderr, bars stay. `places` are directories whose paths are cut.
    """
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            if output.get("name") == "stderr":
                lines = output.text.splitlines(keepends=True)
                output.text = "".join(line for line in lines if "%|" in line)
            for part in (output, output.get("data", {})):
                texts = {"text", "text/plain", "text/html", "text/markdown"}
                for key, place in itertools.product(texts & part.keys(), places):
                    part[key] = part[key].replace(f"{place}{os.sep}", "")
        cell.outputs = [x for x in cell.outputs if x.get("text") != ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """What to run."""

    data_dir: Path
    """The directory of llama2.c's stories260K.bin and tok512.bin, GSM8K, and text."""
    names: tuple[str, ...] = NAMES
    """Notebooks, without .ipynb."""


def shown(name: str, data_dir: Path, directory: Path) -> dict[str, Any]:
    """The parameters that the outputs in the repository are of."""
    if name == "quickstart":
        return {}
    if name == "forgetting_frontier":
        return {"DATA_DIR": str(data_dir)}
    model = directory / "stories260K"
    convert(
        ConvertArgs(
            model=data_dir / "stories260K.bin",
            tokenizer=data_dir / "tok512.bin",
            output=model,
        )
    )
    parameters = {
        "MODEL": str(model),
        "DATA": str(data_dir / "gsm8k_train.jsonl"),
        "EVAL_DATA": str(data_dir / "gsm8k_test.jsonl"),
        "RETAIN_DATA": str(data_dir / "tinystories_excerpt.txt"),
        "BATCH_SIZE": 16,
        "ACCUMULATE": 2,
        "MAX_LENGTH": 256,
        "STEPS": 100,
    }
    if name == "finetune_llama_gpu":
        return parameters | {"LEARNING_RATES": {"adamw": 1e-3, "mofo": 2e-3}}
    tasks = directory / "tasks"
    tasks.mkdir()
    text = (data_dir / "tinystories_excerpt.txt").read_text()
    return parameters | {
        "LEARNING_RATE": 2e-3,
        "TASKS": "stories_choice,stories_letter",
        "TASK_FILES": str(write_tasks(tasks, text, count=50)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    data_dir = args.data_dir.resolve()
    for name in args.names:
        print(name)
        flags = "--xla_force_host_platform_device_count=8" if "tpu" in name else ""
        os.environ["XLA_FLAGS"] = flags
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            notebook = execute(name, shown(name, data_dir, directory), directory)
            clean(notebook, directory, data_dir)
        nbformat.write(notebook, NOTEBOOKS / f"{name}.ipynb")


if __name__ == "__main__":
    main()
