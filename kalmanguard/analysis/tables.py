"""What readers yield: pieces of a log as columns, in which an absent value and a logged nan stay different."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kalmanguard.records import FloatArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


class Column(NamedTuple):
    """Values ``(m,)`` and where there are any; what was not logged is nan in ``values`` and False in ``logged``."""

    values: FloatArray
    logged: BoolArray


class Chunk(NamedTuple):
    """Some rows of a log under its own column names; ``texts`` are columns that hold words, one for every row."""

    rows: int
    columns: Mapping[str, Column]
    texts: Mapping[str, tuple[str, ...]] = {}
    velocities: FloatArray | None = None


class Reader(Protocol):
    """One file, or one stream of records.

    ``format`` is its name in notes, ``notes`` grow while it is read, ``named`` says that columns already carry the
    names of our channels.
    """

    format: str
    notes: list[str]
    named: bool

    def chunks(self) -> Iterator[Chunk]:
        """The rows in order, some ten thousand at a time."""
        ...


#: Words for what is absent; nan and infinities are values that were logged.
ABSENT = frozenset(("", "null", "none", "na", "n/a", "-"))


def printable(text: str) -> str:
    r"""A name that can be shown anywhere: control characters and what is no text become question marks.

    >>> printable("run\x1b[2J"), printable("caf\u00e9 \ud800")
    ('run?[2J', 'café ?')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "?" for c in text)


def numeric(cells: list[str]) -> Column | None:
    """Convert a column of words to numbers; ``None`` when it holds other words."""
    try:
        values = np.array(list(map(float, cells)), dtype=np.float64)
    except ValueError:
        pass
    else:
        return Column(values, np.ones(len(cells), dtype=np.bool_))
    found = np.full(len(cells), np.nan)
    logged = np.zeros(len(cells), dtype=np.bool_)
    for row, cell in enumerate(cells):
        word = cell.strip()
        if word.lower() in ABSENT:
            continue
        try:
            found[row] = float(word)
        except ValueError:
            return None
        logged[row] = True
    return Column(found, logged)
