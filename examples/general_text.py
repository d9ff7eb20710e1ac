"""Text such as language models are pretrained on, from the Python that runs this.

Half of it is English, the language reference that `help()` shows; half is code, sources
of modules. Both are under the licence of the Python Software Foundation and depend on
Python's version, which `python_functions.version` tells. They stay on the machine:
nothing of them is part of this project.

SmolLM2-135M-Instruct predicts these two better than other text that packages carry:
notes on chemical elements, the notes in SciPy's documentation, licences.
"""

import importlib
import inspect
from pathlib import Path
from pydoc_data.topics import topics

FILE = "general.txt"
MODULES = ("statistics", "heapq", "random", "textwrap", "fractions", "bisect")
CHARACTERS = 12_000  # of each half


def general_text(characters: int = CHARACTERS) -> str:
    """The text, so many characters of English and as many of code.

    Raises:
      ValueError: There is not as much.
    """
    english = "\n\n".join(topics[name].strip() for name in sorted(topics))
    modules = map(importlib.import_module, MODULES)
    code = "\n\n".join(inspect.getsource(module) for module in modules)
    most = min(len(english), len(code))
    if not 1 <= characters <= most:
        raise ValueError(f"characters must be 1 to {most}, got {characters}")
    return f"{english[:characters]}\n\n{code[:characters]}\n"


def write_general_text(directory: Path) -> None:
    """Writes DIRECTORY/general.txt, for --retain-data."""
    (directory / FILE).write_text(general_text(), encoding="utf-8")
