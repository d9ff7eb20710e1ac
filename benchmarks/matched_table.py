"""Tables of methods that are compared where they reach the same loss."""

from collections.abc import Mapping, Sequence

import numpy as np

from mofo_jax.continual import Comparison


def table(
    heads: Sequence[str],
    titles: Mapping[str, Sequence[str]],
    found: Mapping[float, Mapping[str, Comparison]],
    form: str,
) -> list[str]:
    """A Markdown table with a row for each name and columns for each loss.

    Args:
      heads: Over the first columns.
      titles: What a name has in those.
      found: By loss, what `compare_at_loss` returned.
      form: Of the numbers, as ".3f".
    """
    places = [f"at {x:.3g} | gap | interval" for x in found]
    lines = [
        f"| {' | '.join([*heads, 'seeds', *places])} |",
        "|---" * (len(heads) + 1 + 3 * len(found)) + "|",
    ]
    for name, title in titles.items():
        cells = []
        for rows in found.values():
            row = rows.get(name)
            if row is None:
                cells += ["", "", ""]
            elif row.gap:
                gap, limits = row.gap, row.interval
                cells += [f"{row.mean:{form}}", f"{gap:+{form}}"]
                cells.append(span(limits, f"+{form}"))
            else:  # what the others are held against
                cells += [f"{row.mean:{form}}", "", ""]
        seeds = {rows[name].seeds for rows in found.values() if name in rows}
        if seeds:
            cells = [str(max(seeds)), *cells]
            lines.append(f"| {' | '.join([*title, *cells])} |")
    return lines


def span(limits: tuple[float, float], form: str) -> str:
    """An interval for a table; nothing where there is none."""
    low, high = limits
    return "" if np.isnan(low) else f"{low:{form}} to {high:{form}}"
