"""Sphinx builds the documentation site from this; see `make docs`."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "mofo_jax"
author = "the authors of mofo_jax"
copyright = f"2026, {author}"
release = re.search(
    r'__version__ = "(.*)"', (ROOT / "mofo_jax/__init__.py").read_text()
)[1]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests run the notebooks
html_theme = "furo"
html_title = f"mofo_jax {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say them in words
napoleon_google_docstring = True
napoleon_use_ivar = True
nitpicky = True
# Signatures and docstrings name objects of other libraries, whose sites are not asked.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jnp|lax|optax|flax|nnx|np|numpy)\..*"),
    ("py:.*", "ArrayTree"),  # Optax's
]
