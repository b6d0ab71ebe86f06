"""Our own journal, as columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from kalmanguard.analysis.tables import Chunk, Column
from kalmanguard.errors import JournalError, TrajectoryError
from kalmanguard.journal.reader import JournalReader as Journal
from kalmanguard.records import FloatArray, Measurement

_ROWS = 4_096


class JournalReader:
    """Streams what was measured; what only records a restored state is no row of training."""

    format = "journal"
    named = True

    def __init__(self, path: Path) -> None:
        self.notes: list[str] = []
        self._path = path

    def chunks(self) -> Iterator[Chunk]:
        try:
            with Journal(self._path) as journal:
                if not journal.complete:
                    self.notes.append("The journal was not closed: the run goes on, or was cut short.")
                rows = (m for m, _ in journal.steps() if m.outcome is None and m.step > 0)
                any_row = False
                while batch := list(islice(rows, _ROWS)):
                    any_row = True
                    yield _chunk(batch)
        except JournalError as error:
            raise TrajectoryError(str(error)) from None
        if not any_row:
            raise TrajectoryError(f"The journal {self._path} holds no steps yet.")


def _chunk(rows: list[Measurement]) -> Chunk:
    columns = {
        "step": _column([m.step for m in rows]),
        "loss": _column([m.loss for m in rows]),
        "probe": _column([None if m.probe is None else m.probe.mean for m in rows]),
        "learning_rate": _column([max(m.learning_rates) * m.lr_factor if m.learning_rates else None for m in rows]),
        "gradient_norm": _column([m.gradient_norm for m in rows]),
        "buffer_norm": _column([m.buffer_norm for m in rows]),
    }
    return Chunk(len(rows), {k: c for k, c in columns.items() if c.logged.any()}, {}, _velocities(rows))


def _column(values: list[float | None] | list[int]) -> Column:
    logged = np.array([value is not None for value in values], dtype=np.bool_)
    return Column(np.array([math.nan if v is None else v for v in values], dtype=np.float64), logged)


def _velocities(rows: list[Measurement]) -> FloatArray | None:
    known = [m.velocity for m in rows if m.velocity is not None]
    if not known:
        return None
    table = np.full((len(rows), len(known[0])), np.nan)
    for row, m in enumerate(rows):
        if m.velocity is not None:
            table[row] = m.velocity
    return table
