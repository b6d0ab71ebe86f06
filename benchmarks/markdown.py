"""Tables, and the markers between which the tool keeps a page up to date."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table whose first column is text and whose others are numbers."""
    lines = [list(head), ["---", *["--:"] * (len(head) - 1)], *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits; what is missing or not finite as infinity."""
    if value is None or not math.isfinite(value):
        return "∞"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size >= 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Write the median and, after a slash, the largest; a dash without values."""
    if not values:
        return "–"
    known = np.array([math.inf if value is None or math.isnan(value) else value for value in values])
    return f"{number(middle(known), digits)} / {number(float(known.max()), digits)}"


def counts(values: Sequence[float | None]) -> str:
    """Write median and largest of whole numbers; a dash without values."""
    if not values:
        return "–"
    known = np.array([math.inf if value is None else value for value in values])
    median, most = middle(known), float(known.max())
    return " / ".join("∞" if math.isinf(v) else f"{v:g}" for v in (median, most))


def middle(values: np.ndarray) -> float:
    """Median that may be infinite (numpy's makes nan of two infinite middles)."""
    ordered = np.sort(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float(low if low == high else (low + high) / 2)


def insert(page: Path, name: str, section: str) -> None:
    """Put a section between ``<!-- name -->`` and ``<!-- /name -->`` of a page.

    Raises
    ------
    SystemExit
        The page has no such markers, or not in that order.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = page.read_text(encoding="utf-8")
    start, end = text.find(opening), text.find(closing)
    if not 0 <= start < end:
        raise SystemExit(f"{page} has no lines {opening} and {closing}: put them where the section shall stand.")
    draft = page.with_suffix(".part")
    draft.write_text(f"{text[:start]}{opening}\n\n{section.strip()}\n\n{text[end:]}", encoding="utf-8")
    draft.replace(page)
