"""CSV and TSV files with a header, compressed or not."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from kalmanguard.analysis.formats.bytes import lines
from kalmanguard.analysis.tables import Chunk, Column, numeric
from kalmanguard.errors import TrajectoryError

_ROWS = 32_768
_MOST_COLUMNS = 4_096
_DELIMITERS = ",\t;|"


class DelimitedReader:
    """Streams a file; the delimiter is the one of comma, tab, semicolon and bar that the header has most of."""

    named = False

    def __init__(self, path: Path) -> None:
        self.format = "CSV"
        self.notes: list[str] = []
        self._path = path

    def chunks(self) -> Iterator[Chunk]:
        text = lines(self._path, self.notes)
        first = next(text, "")
        while first.startswith("#") or (first and not first.strip()):
            first = next(text, "")
        delimiter = max(_DELIMITERS, key=first.count)
        try:
            names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        except csv.Error as error:
            raise TrajectoryError(f"{self._path} is no CSV file: {error}.") from None
        self._check(names)
        if delimiter == "\t":
            self.format = "TSV"
        rows = csv.reader(text, delimiter=delimiter)
        kinds: dict[str, bool] = {}
        short = 0
        try:
            while batch := list(islice(rows, _ROWS)):
                whole = [row for row in batch if len(row) == len(names)]
                short += sum(len(row) != len(names) and bool(row) for row in batch)
                if whole:
                    yield self._chunk(names, whole, kinds)
        except csv.Error as error:
            raise TrajectoryError(f"{self._path} is no CSV file: {error}.") from None
        if not kinds:
            raise TrajectoryError(f"{self._path} has a header and no rows of {len(names)} cells.")
        if short:
            self.notes.append(f"{short:,} lines have another number of cells than the header and were left out.")

    def _check(self, names: list[str]) -> None:
        if not any(names):
            raise TrajectoryError(f"{self._path} is empty: there is no header.")
        if len(names) > _MOST_COLUMNS:
            raise TrajectoryError(f"{self._path} has {len(names):,} columns; at most {_MOST_COLUMNS:,} are read.")
        if all(_is_number(name) for name in names):
            raise TrajectoryError(f"{self._path} begins with numbers: its first line must name the columns.")
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise TrajectoryError(f"{self._path} has two columns named {twice!r}: rename one of them.")

    def _chunk(self, names: list[str], rows: list[list[str]], kinds: dict[str, bool]) -> Chunk:
        columns: dict[str, Column] = {}
        texts: dict[str, tuple[str, ...]] = {}
        for name, cells in zip(names, map(list, zip(*rows, strict=True)), strict=True):
            if not name:
                continue
            column = numeric(cells)
            if column is not None and not column.logged.any():
                continue  # nothing in it yet: what it holds is not known
            is_number = kinds.setdefault(name, column is not None)
            if column is not None and is_number:
                columns[name] = column
            elif is_number:
                bad = next(cell for cell in cells if numeric([cell]) is None)
                raise TrajectoryError(
                    f"Column {name!r} of {self._path} holds numbers and words, such as {bad[:40]!r}: "
                    "write numbers with a point, and nothing or null where there is none."
                )
            else:
                texts[name] = tuple(cells)
        return Chunk(len(rows), columns, texts)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
