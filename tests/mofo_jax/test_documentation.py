"""What is public is documented: in the reference, and with an example that runs."""

import re
from pathlib import Path

import pytest

import mofo_jax
import mofo_jax.continual
import mofo_jax.testing

REFERENCE = Path(__file__).parents[2] / "docs/api.rst"
MODULES = (mofo_jax, mofo_jax.testing, mofo_jax.continual)
NAMES = [(module, name) for module in MODULES for name in module.__all__]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_docstrings(module, name):
    """Doctests run with all tests; see pyproject.toml."""
    text = getattr(module, name).__doc__
    assert text and ("Returns:" in text or "Attributes:" in text)
    if callable(getattr(module, name)) and not isinstance(getattr(module, name), type):
        assert ">>>" in text


def test_reference_has_all_and_no_more():
    text = REFERENCE.read_text()
    parts = re.split(r"\.\. currentmodule:: (.*)\n", text)[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    assert found.keys() == {module.__name__ for module in MODULES}
    for module in MODULES:
        names = re.findall(
            r"\.\. auto(?:function|class):: (\w+)", found[module.__name__]
        )
        assert sorted(names) == sorted(module.__all__)
