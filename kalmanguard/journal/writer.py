"""The one writer of a run's journal: append-only, hash-chained, committed in small batches."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self, final

import numpy as np

from kalmanguard.errors import JournalError
from kalmanguard.journal.codec import pack
from kalmanguard.journal.database import connect_to_write, failure, fold_log, is_blank, prepare_to_write, sync_to_disk
from kalmanguard.journal.schema import COLUMNS, GENESIS, Row, chained, is_intact, locate
from kalmanguard.records import Decision, Level, Measurement

_INSERT = f"INSERT INTO records ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
_LAST = f"SELECT {COLUMNS} FROM records ORDER BY seq DESC LIMIT 2"
_RESERVED = frozenset({"header", "step", "close"})
#: So many uneventful steps are committed together, unless the last commit is so many seconds ago: in a training loop,
#: whose own work evicts the database from the caches, the commit is dear, and costs the same with one row or sixteen.
BATCH = 16
WAIT_S = 1.0
_UNEVENTFUL = (Level.NOMINAL, Level.WARMUP)


@final
class JournalWriter:
    """Appends a run's records to ``journal.sqlite``, each bound to the one before by its digest.

    Uneventful steps of one second are committed together, at most sixteen; whatever else is written, suspicions and
    interventions above all, is committed with them before the call returns. So ``kill -9`` loses at most the last
    fifteen uneventful steps, and none in loops with steps of a second or more. `sync` makes everything durable against
    the loss of the machine.

    The first failure to write (disk full, folder gone, a second writer) is raised as `JournalError`, with nothing
    half-written; from then on the writer is ``failed`` and ignores what it is given, so that the run it records can go
    on and its journal, without a closing record, reads INCOMPLETE.

    Parameters
    ----------
    path
        Run folder, created if needed, or a path ending in ``.sqlite``. ``None`` keeps the journal in a private
        temporary database that vanishes with the writer; `save_copy` saves it.

    Raises
    ------
    JournalError
        When the file holds a run already, is foreign or newer, or cannot be written to.

    Notes
    -----
    About 10 us a step, commits included, when nothing evicts the database from the caches (``python -m benchmarks
    journal``).

    Examples
    --------
    >>> journal = JournalWriter(None)
    >>> journal.write_header({"format": 1})
    >>> journal.record("note", 0, {"text": "made by hand"})
    >>> journal.rows, len(journal.head)
    (2, 64)
    >>> journal.close({"steps": 0})
    """

    def __init__(self, path: str | Path | None) -> None:
        self._open(path, resume=False)

    @classmethod
    def resume(cls, path: str | Path) -> Self:
        """Continue the journal of a run that was interrupted or closed; nothing that was written is changed.

        Raises
        ------
        JournalError
            When there is no run to continue, or its last record does not follow from the one before.
        """
        writer = cls.__new__(cls)
        writer._open(path, resume=True)
        return writer

    def _open(self, path: str | Path | None, *, resume: bool) -> None:
        self.path = None if path is None else locate(path)
        self.failed: str | None = None
        self._lock = Lock()
        self._waiting: list[tuple[int, bytes, bytes]] = []
        self._due = 0.0
        self._rows = 0
        self._step = 0
        self._head = GENESIS
        if resume and not (self.path and self.path.is_file()):
            raise JournalError(f"There is no journal at {self.path} to resume: start the run without resume.")
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = connect_to_write(self.path)
            try:
                self._take_up(connection, resume)
                prepare_to_write(connection, self.path)
            except BaseException:
                connection.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise failure(self.path or "(temporary)", "opened for writing", error) from error
        self._connection: sqlite3.Connection | None = connection
        self._process = os.getpid()

    def _take_up(self, connection: sqlite3.Connection, resume: bool) -> None:
        last = [] if is_blank(connection) else [Row(*row) for row in connection.execute(_LAST)]
        if not last:
            if resume:
                raise JournalError(f"The journal {self.path} holds no run to resume: start the run without resume.")
            return
        if not resume:
            raise JournalError(
                f"{self.path} holds a run of {last[0].seq} records; pass resume to continue it, or choose another run "
                "folder: a journal is never overwritten."
            )
        if not is_intact(last[0], last[1].digest if len(last) > 1 else GENESIS):
            raise JournalError(
                f"The last record of {self.path} does not follow from the one before: the file was changed or damaged, "
                "so it cannot be continued. Keep it, and start a new run folder."
            )
        self._rows, self._step, self._head = last[0].seq, last[0].step, last[0].digest

    @property
    def head(self) -> str:
        """Digest of the last record, in hexadecimal: published outside the run, it fixes everything before it."""
        self.flush()
        return self._head.hex()

    @property
    def rows(self) -> int:
        """Number of records, with those that wait for a commit."""
        return self._rows + len(self._waiting)

    @property
    def last_step(self) -> int:
        """Step that the last record belongs to, with those that wait for a commit."""
        waiting = self._waiting
        return waiting[-1][0] if waiting else self._step

    def write_header(self, header: Mapping[str, Any]) -> None:
        """Write the first record: versions, settings, probe, plant and the certificate's constants."""
        if self._rows:
            raise JournalError("The journal has its header already: a run's constants are written once, first.")
        self._append("header", b"header", 0, _json(header), b"", first=True)

    def step(self, measurement: Measurement, decision: Decision, statistics: bytes | None = None) -> None:
        """Write one step: what the engine saw, decided and computed; ``statistics`` replaces the decision's own."""
        if self.failed is not None:
            return
        if self._connection is None or not self._rows:
            raise JournalError("The journal is closed." if self._rows else "Write the journal's header first.")
        body, blob = pack(measurement, decision, statistics)
        with self._lock:
            self._waiting.append((measurement.step, body, blob))
        full = len(self._waiting) >= BATCH
        if full or decision.level not in _UNEVENTFUL or time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Commit the steps that wait; a process that is killed from here on does not lose them."""
        if self._waiting and self._connection is not None:
            self._guarded(lambda connection: None)

    def record(self, kind: str, step: int, data: Mapping[str, Any], blob: bytes = b"") -> None:
        """Write a rare record, such as an intent or an outcome, as JSON with an optional array."""
        if kind in _RESERVED or not kind.isidentifier() or not kind.isascii():
            raise JournalError(f"{kind!r} is not a kind of record that can be written: take another word.")
        self._append(kind, kind.encode(), step, _json(data), blob)

    def sync(self) -> None:
        """Flush all records to the disk: before an intervention, so that it is never done unrecorded."""
        if self.path is not None:
            self._guarded(sync_to_disk)

    def seal(self, path: str | Path) -> None:
        """Write the head and the number of records to a text file, to be kept outside the run."""
        path = Path(path)
        draft = path.with_name(path.name + ".part")
        try:
            draft.write_text(f"{self.head} {self._rows}\n", encoding="ascii")
            os.replace(draft, path)
        except OSError as error:
            raise JournalError(f"The journal's head cannot be written to {path}: {error.strerror}.") from error

    def save_copy(self, path: str | Path) -> None:
        """Save what has been written so far as a journal of its own, which may not exist yet; the run goes on."""
        file = locate(path)
        draft = file.with_name(file.name + ".part")
        if file.exists():
            raise JournalError(f"{file} exists already: choose another place for the copy.")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft.unlink(missing_ok=True)
            copy = sqlite3.connect(draft, isolation_level=None)
            try:
                self._guarded(lambda connection: connection.backup(copy))
                fold_log(copy)
            finally:
                copy.close()
            os.replace(draft, file)
        except (sqlite3.Error, OSError) as error:
            raise failure(file, "copied", error) from error

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Write the closing record, flush, and leave one plain file behind. Closing twice is harmless."""
        if self._connection is None:
            return
        try:
            self.flush()
            if self._rows:
                data = {"rows": self._rows + 1, **(summary or {})}
                self._append("close", b"close", self._step, _json(data), b"")
                self.sync()
                if self.path is not None:
                    self._guarded(fold_log)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the file without a closing record: the run reads INCOMPLETE."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with self._lock:
                try:
                    self._commit(connection)
                except (sqlite3.Error, OSError) as error:
                    self._fail(error)
                connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def _append(
        self, kind: str, kind_bytes: bytes, step: int, body: bytes | str, blob: bytes, *, first: bool = False
    ) -> None:
        raw = body.encode() if isinstance(body, str) else body
        with self._lock:
            if self.failed is not None:
                return
            if self._connection is None or not (self._rows or first):
                raise JournalError("The journal is closed." if self._rows else "Write the journal's header first.")
            try:
                self._commit(self._connection)
                seq = self._rows + 1
                digest = chained(self._head, seq, kind_bytes, step, raw, blob)
                self._connection.execute(_INSERT, (seq, kind, step, body, blob, digest))
            except (sqlite3.Error, OSError) as error:
                raise self._fail(error) from error
            self._rows, self._step, self._head = seq, step, digest

    def _commit(self, connection: sqlite3.Connection) -> None:
        """Write the steps that wait, all or none; the lock is held."""
        if not self._waiting:
            return
        if os.getpid() != self._process:
            # A forked child has a copy of what waits, and a connection that it must not use.
            self._waiting = []
            return
        seq, head, step, rows = self._rows, self._head, self._step, []
        for step, body, blob in self._waiting:
            seq += 1
            head = chained(head, seq, b"step", step, body, blob)
            rows.append((seq, "step", step, body, blob, head))
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany(_INSERT, rows)
            connection.execute("COMMIT")
        except BaseException:
            # What waits goes on waiting: an interrupt from the keyboard must not lose it.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._waiting, self._due = [], time.monotonic() + WAIT_S
        self._rows, self._step, self._head = seq, step, head

    def _guarded(self, work: Callable[[sqlite3.Connection], object]) -> None:
        with self._lock:
            if self.failed is not None:
                return
            if self._connection is None:
                raise JournalError("The journal is closed.")
            try:
                self._commit(self._connection)
                work(self._connection)
            except (sqlite3.Error, OSError) as error:
                raise self._fail(error) from error

    def _fail(self, error: Exception) -> JournalError:
        raised = failure(self.path or "(temporary)", "written", error)
        self.failed, self._waiting = str(raised), []
        return raised


def _json(data: Mapping[str, Any]) -> str:
    try:
        return json.dumps(data, separators=(",", ":"), default=_plain)
    except (TypeError, ValueError) as error:
        raise JournalError(f"A record cannot be written as JSON: {error}.") from error


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not a number, text, list or dict")
