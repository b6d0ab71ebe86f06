"""Reads a journal without ever changing it: while the run writes, after its death, from a read-only folder."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from kalmanguard.errors import JournalError
from kalmanguard.journal.codec import unpack, unpack_statistics
from kalmanguard.journal.database import failure, open_for_reading
from kalmanguard.journal.schema import COLUMNS, GENESIS, Row, is_intact, locate
from kalmanguard.records import Decision, FloatArray, Measurement

_SELECT = f"SELECT {COLUMNS} FROM records"
_BATCH = 256


@final
class JournalReader:
    """Streams the records of one run.

    Rows are fetched in short batches, so that a long read neither fills memory nor keeps the writer from folding its
    log; each iteration ends with the last record that was there when it began.

    Parameters
    ----------
    path
        Run folder, or the journal's file.
    traceless
        Leave nothing beside a journal that nobody writes, not even SQLite's empty log. For short looks only: a writer
        that begins meanwhile is not noticed.

    Raises
    ------
    JournalError
        When the file is missing, foreign, damaged, of a newer version, or holds no record yet.

    Examples
    --------
    >>> import tempfile
    >>> from kalmanguard.journal import JournalWriter
    >>> folder = tempfile.mkdtemp()
    >>> with JournalWriter(folder) as journal:
    ...     journal.write_header({"format": 1, "statistics": []})
    >>> with JournalReader(folder) as reader:
    ...     reader.header["format"], reader.complete, reader.check_chain()
    (1, True, 2)
    """

    def __init__(self, path: str | Path, *, traceless: bool = False) -> None:
        self.path = locate(path)
        self._connection = open_for_reading(self.path, traceless=traceless)
        try:
            first = next(self.rows(), None)
            if first is None:
                raise JournalError(f"The journal {self.path} holds no record yet.")
            if first.kind != "header":
                raise JournalError(f"The journal {self.path} begins with {first.kind!r} instead of a header.")
            #: The run's first record.
            self.header: dict[str, Any] = first.data()
        except BaseException:
            self._connection.close()
            raise

    @property
    def statistic_names(self) -> tuple[str, ...]:
        """Names of the per-step statistics, in their order."""
        return tuple(self.header.get("statistics", ()))

    @property
    def last(self) -> Row:
        """The last record."""
        return Row(*self._fetch(f"{_SELECT} ORDER BY seq DESC LIMIT 1", ())[0])

    @property
    def head(self) -> str:
        """Digest of the last record, in hexadecimal."""
        return self.last.digest.hex()

    @property
    def complete(self) -> bool:
        """Whether the writer closed the journal."""
        return self.last.kind == "close"

    def __len__(self) -> int:
        return self.last.seq

    def rows(self, kind: str | None = None, start: int = 0) -> Iterator[Row]:
        """Records with ``seq >= start``, in order, of one ``kind`` or of all."""
        last = self._fetch("SELECT max(seq) FROM records", ())[0][0] or 0
        extra, more = ("", ()) if kind is None else (" AND kind = ?", (kind,))
        query = f"{_SELECT} WHERE seq > ? AND seq <= ?{extra} ORDER BY seq LIMIT {_BATCH}"
        at = start - 1
        while batch := self._fetch(query, (at, last, *more)):
            for row in batch:
                yield Row(*row)
            at = batch[-1][0]

    def steps(self, start: int = 0) -> Iterator[tuple[Measurement, Decision]]:
        """What the engine saw and decided, step by step."""
        for row in self.rows("step", start):
            yield unpack(*_binary(row))

    def statistics(self, start: int = 0) -> Iterator[tuple[int, FloatArray]]:
        """Step and named statistics (`statistic_names`) of every step that has them."""
        for row in self.rows("step", start):
            values = unpack_statistics(*_binary(row))
            if values.size:
                yield row.step, values

    def check_chain(self) -> int:
        """Recompute the hash chain from the first record to the last.

        Returns
        -------
        int
            Number of records.

        Raises
        ------
        JournalError
            At the first record that does not follow from the one before.
        """
        seq, digest = 0, GENESIS
        for row in self.rows():
            if row.seq != seq + 1 or not is_intact(row, digest):
                raise JournalError(
                    f"Record {row.seq} of {self.path} does not follow from record {seq}: the journal was changed or "
                    "damaged there, and nothing after it can be trusted."
                )
            seq, digest = row.seq, row.digest
        return seq

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _fetch(self, query: str, values: tuple[object, ...]) -> list[Any]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise failure(self.path, "read", error) from error


def _binary(row: Row) -> tuple[bytes, bytes]:
    if not isinstance(row.body, bytes) or not isinstance(row.blob, bytes):
        raise JournalError(f"Record {row.seq} of the journal has no binary body.")
    return row.body, row.blob
