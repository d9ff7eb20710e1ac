"""What benchmarks leave: numbers as JSON, and beside it a table and a plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def make_room(output: Path) -> None:
    """Makes the directory of a results' file; ValueError unless that is one of JSON."""
    if output.suffix != ".json":
        raise ValueError(f"output must end in .json, got {output}")
    output.parent.mkdir(parents=True, exist_ok=True)


def publish(
    results: dict[str, Any],
    output: Path,
    table: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None],
) -> None:
    """Writes the table and the plot beside the numbers, and prints the table."""
    text = table(results)
    output.with_suffix(".md").write_text(text)
    plot(results, output.with_suffix(".png"))
    print(text)
