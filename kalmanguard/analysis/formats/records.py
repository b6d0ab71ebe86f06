"""JSON lines, and JSON arrays of records, compressed or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kalmanguard.analysis.columns import is_channel
from kalmanguard.analysis.formats.bytes import lines
from kalmanguard.analysis.tables import ABSENT, Chunk, Column
from kalmanguard.errors import TrajectoryError
from kalmanguard.records import FloatArray

_ROWS = 16_384
_MOST_COLUMNS = 4_096
#: A JSON document is read whole; larger ones should be lines.
_LARGEST_DOCUMENT = 1 << 28
#: Key under which the recorder keeps sketched updates.
VELOCITY = "velocity"
#: How deep records may be nested: ``{"train": {"loss": 1}}`` is the column ``train/loss``.
_DEEPEST = 4


class RecordsReader:
    """Streams one record a line; a document that is one array, or one object with a list of records, is read whole.

    Parameters
    ----------
    path
        The file.
    document
        It is one JSON document, not lines.
    key
        Only the list under this key of the document.
    """

    named = False

    def __init__(self, path: Path, *, document: bool = False, key: str | None = None) -> None:
        self.format = "JSON" if document else "JSON lines"
        self.notes: list[str] = []
        self._path, self._document, self._key = path, document, key

    def chunks(self) -> Iterator[Chunk]:
        records = self._whole() if self._document else self._lines()
        any_row = False
        while batch := list(islice(records, _ROWS)):
            any_row = True
            yield chunk_of(batch, str(self._path), self.notes)
        if not any_row:
            raise TrajectoryError(f"{self._path} holds no records.")

    def _lines(self) -> Iterator[dict[str, Any]]:
        pending: str | None = None
        for number, line in enumerate(lines(self._path, self.notes), start=1):
            if not line.strip():
                continue
            if pending is not None:
                raise TrajectoryError(f"{self._path}, {pending}")
            try:
                yield flat(json.loads(line), f"line {number:,}")
            except (ValueError, RecursionError) as error:
                # Only the last line may be cut short: the run was killed while it wrote.
                pending = f"line {number:,} is no record: {error}."
        if pending is not None:
            self.notes.append(f"The last line is cut short and was left out ({pending})")

    def _bounded(self) -> Iterator[str]:
        read = 0
        for line in lines(self._path, self.notes):
            read += len(line)
            if read > _LARGEST_DOCUMENT:
                raise TrajectoryError(
                    f"{self._path} expands to one JSON document of more than {_LARGEST_DOCUMENT:,} characters: write "
                    "JSON lines instead."
                )
            yield line

    def _whole(self) -> Iterator[dict[str, Any]]:
        if self._path.stat().st_size > _LARGEST_DOCUMENT:
            raise TrajectoryError(
                f"{self._path} is one JSON document of {self._path.stat().st_size:,} bytes: write JSON lines instead."
            )
        try:
            data = json.loads("".join(self._bounded()))
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"{self._path} is no JSON document: {error}.") from None
        if isinstance(data, dict) and self._key is not None:
            data = data.get(self._key)
        if isinstance(data, dict):
            lists = [
                key for key, value in data.items() if isinstance(value, list) and value and isinstance(value[0], dict)
            ]
            if len(lists) == 1:
                data = data[lists[0]]
            elif data and all(isinstance(value, list) for value in data.values()):
                data = _rows_of(data, self._path)
        if not isinstance(data, list):
            raise TrajectoryError(f"{self._path} holds a {type(data).__name__}: a list of records is needed.")
        try:
            yield from [flat(item, f"record {number:,}") for number, item in enumerate(data, start=1)]
        except ValueError as error:
            raise TrajectoryError(f"{self._path}: {error}.") from None


def _is_absent(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and cell.strip().lower() in ABSENT)


def flat(item: object, where: str) -> dict[str, Any]:
    """One record with nested keys joined by ``/``.

    Raises
    ------
    ValueError
        It is no object, or nested too deeply.
    """
    if not isinstance(item, dict):
        raise ValueError(f"{where} holds a {type(item).__name__}, not an object")
    found: dict[str, Any] = {}

    def take(prefix: str, value: object, depth: int) -> None:
        if isinstance(value, dict):
            if depth == _DEEPEST:
                raise ValueError(f"{where} is nested more than {_DEEPEST} deep")
            for key, inner in value.items():
                take(f"{prefix}/{key}" if prefix else str(key), inner, depth + 1)
        else:
            found[prefix] = value

    take("", item, 0)
    return found


def chunk_of(records: list[dict[str, Any]], where: str, notes: list[str]) -> Chunk:
    """Records as columns; numbers may be words, as some loggers write nan.

    Raises
    ------
    TrajectoryError
        There are too many columns, or the step or a loss holds both numbers and something else. What else is odd is
        left out and noted.
    """
    names = dict.fromkeys(key for record in records for key in record)
    if len(names) > _MOST_COLUMNS:
        raise TrajectoryError(f"{where} has more than {_MOST_COLUMNS:,} columns: it is no log.")
    columns: dict[str, Column] = {}
    texts: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name == VELOCITY:
            continue
        cells = [record.get(name) for record in records]
        column, odd = _numbers(cells)
        if column.logged.any():
            columns[name] = column
            if odd and is_channel(name):
                raise TrajectoryError(
                    f"Column {name!r} of {where} holds numbers and others, such as {odd[0]!r:.40}: write numbers, and "
                    "nothing or null where there is none."
                )
            if odd:
                note = f"Column {name!r} holds more than numbers, such as {odd[0]!r:.40}: only its numbers were read."
                if note not in notes:
                    notes.append(note)
        elif all(cell is None or isinstance(cell, str) for cell in cells) and odd:
            texts[name] = tuple("" if cell is None else cell for cell in cells)
    return Chunk(len(records), columns, texts, _velocities(records, where))


def _numbers(cells: list[Any]) -> tuple[Column, list[Any]]:
    """The numbers among cells, and the cells that are neither numbers nor absent."""
    odd: list[Any] = []
    values = np.full(len(cells), np.nan)
    logged = np.zeros(len(cells), dtype=np.bool_)
    for row, cell in enumerate(cells):
        if _is_absent(cell):
            continue
        if isinstance(cell, str):
            try:
                cell = float(cell)
            except ValueError:
                odd.append(cell)
                continue
        elif not isinstance(cell, int | float):
            odd.append(cell)
            continue
        try:
            values[row] = cell
        except OverflowError:
            values[row] = np.inf if cell > 0 else -np.inf
        logged[row] = True
    return Column(values, logged), odd


def _velocities(records: list[dict[str, Any]], where: str) -> FloatArray | None:
    found = [record.get(VELOCITY) for record in records]
    sizes = {len(v) for v in found if isinstance(v, list)}
    if not sizes:
        return None
    if len(sizes) > 1:
        raise TrajectoryError(f"{where} holds sketches of {sorted(sizes)} numbers: they are of different runs.")
    table = np.full((len(records), sizes.pop()), np.nan)
    for row, velocity in enumerate(found):
        if isinstance(velocity, list):
            try:
                table[row] = velocity
            except (TypeError, ValueError):
                raise TrajectoryError(f"{where} holds a sketch that is no list of numbers.") from None
    return table


def _rows_of(data: Mapping[str, list[Any]], path: Path) -> list[dict[str, Any]]:
    """Columns of one length as records."""
    lengths = {len(column) for column in data.values()}
    if len(lengths) != 1:
        raise TrajectoryError(f"{path} holds lists of {sorted(lengths)} values: columns must be of one length.")
    return [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
