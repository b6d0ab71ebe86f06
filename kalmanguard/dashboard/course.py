"""One run as the page shows it: its journal read once, row by row as they come, into bounded memory."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from kalmanguard.dashboard.buckets import Buckets, Stretch
from kalmanguard.dashboard.columns import AT, COLUMNS, MEMORY, Decoder, StepTable
from kalmanguard.dashboard.events import EventLog, of_record, of_step
from kalmanguard.dashboard.findings import FindingLog
from kalmanguard.errors import JournalError
from kalmanguard.journal.codec import ACTIONS, HEAD, LEVELS, OUTCOME, unpack
from kalmanguard.journal.reader import JournalReader
from kalmanguard.journal.schema import Row

#: Buckets of a run, and rows that are decoded at once.
BUCKETS, CHUNK = 16_384, 512
#: Rows of the journal that a close look may read, and those before it that the jerk ratio needs.
CLOSEST = 80_000
#: Steps of which suspicions count as present.
RECENT = 50

Signature = tuple[tuple[int, int, int], ...]


def signature(file: Path) -> Signature:
    """What changes when a journal does: number, size and time of the file and of its log; empty when it is gone."""
    found = []
    for path in (file, Path(f"{file}-wal")):
        try:
            status = os.stat(path, follow_symlinks=False)
        except OSError:
            continue
        found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


@final
class Course:
    """What has been read of a run; safe to use from several threads.

    Parameters
    ----------
    file
        The journal. A symbolic link is refused, whatever it points at.

    Notes
    -----
    About 27 us a row, once. Memory does not depend on the length of the run: about 6 MB. The journal is open only
    while new rows are read, a few milliseconds, so that the writer can fold its log whenever it wants to.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lock = RLock()
        self.revision = 0
        self._begin()

    def _begin(self) -> None:
        self.header: dict[str, Any] = {}
        self.trouble: str | None = None
        self.records = self.total = 0
        self.first_step: int | None = None
        self.last_step = 0
        self.complete = False
        self.changed_at = time.time()
        self.events, self.findings = EventLog(), FindingLog()
        self.actions: Counter[str] = Counter()
        self.levels: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        #: Last known value of every column, and the codes of the last step's state.
        self.latest = np.full(len(COLUMNS), np.nan)
        self.state: dict[str, int] = {"level": 0, "mode": 0, "action": 0, "proposed": 0}
        self.last_reason = ""
        self.recent: deque[tuple[int, int]] = deque(maxlen=RECENT)
        self.detectors: Counter[str] = Counter()
        self._buckets = Buckets(len(COLUMNS), most=BUCKETS)
        self._first_digest = b""
        self._next = 1
        self._signature: Signature = ((-1, 0, 0),)
        self._decoder = Decoder(())

    @property
    def signature(self) -> Signature:
        """Of the journal when it was last read to its end."""
        return self._signature

    @property
    def behind(self) -> int:
        """Records that have not been read yet, as far as is known."""
        return max(0, self.total - self.records)

    def refresh(self, budget_s: float = 0.5, stop: Callable[[], bool] = lambda: False) -> bool:
        """Read what is new, for so many seconds at most; returns whether anything has changed.

        Never raises for what is wrong with a journal: `trouble` says it, and what was read before stays.
        """
        now = signature(self.file)
        if now == self._signature and not self.behind and (self.records or self.trouble):
            return False
        before = (self.revision, self.trouble)
        try:
            if self.file.is_symlink():
                raise JournalError("The journal has become a symbolic link, which is not followed.")
            with JournalReader(self.file, traceless=True) as reader:
                self._read(reader, time.monotonic() + budget_s, stop)
            self._found(None)
        except (JournalError, OSError, RecursionError) as error:
            gone = "The run's folder or its journal is gone; what was read of it is still shown."
            self._found(gone if not now else str(error).replace(str(self.file), "of this run"))
        if not self.behind:
            self._signature = now
        return before != (self.revision, self.trouble)

    def glance(self) -> bool:
        """Read the header and the last step only, as long as nothing else was read; returns whether it has changed."""
        now = signature(self.file)
        if self.records or now == self._signature:
            return False
        try:
            if self.file.is_symlink():
                raise JournalError("The journal is a symbolic link, which is not followed.")
            with JournalReader(self.file, traceless=True) as reader:
                last = reader.last
                steps = [row for row in reader.rows(start=last.seq - 2 * RECENT) if row.kind == "step"]
                names = reader.header.get("statistics")
                table = Decoder(names if isinstance(names, list) else ()).decode(steps[-RECENT:]) if steps else None
            with self.lock:
                self.header, self.complete = reader.header, last.kind == "close"
                if table is not None:
                    self._see(table)
            self._found(None)
        except (JournalError, OSError, RecursionError) as error:
            self._found(str(error).replace(str(self.file), "of this run"))
        self._signature = now
        return True

    def _found(self, trouble: str | None) -> None:
        with self.lock:
            if trouble != self.trouble:
                self.trouble = trouble
                self.revision += 1
            if trouble is not None:
                self.total = self.records

    def _read(self, reader: JournalReader, deadline: float, stop: Callable[[], bool]) -> None:
        first = next(reader.rows())
        last = reader.last.seq
        with self.lock:
            if first.digest != self._first_digest or last < self._next - 1:
                revision = self.revision
                self._begin()  # another run in the same place
                self.revision = revision + 1
                self.header, self._first_digest = reader.header, first.digest
                names = reader.header.get("statistics")
                self._decoder = Decoder(names if isinstance(names, list) else ())
            self.total = last
        rows = reader.rows(start=self._next)
        while chunk := list(islice(rows, CHUNK)):
            with self.lock:
                self._take(chunk)
                self.revision += 1
            if time.monotonic() >= deadline or stop():
                return

    def _take(self, chunk: list[Row]) -> None:
        steps = [row for row in chunk if row.kind == "step"]
        remarkable = self._note(steps, self._decoder.decode(steps)) if steps else frozenset()
        for row in chunk:
            self.kinds[row.kind] += 1
            if row.seq in remarkable:
                self._remark(row)
            elif row.kind not in ("step", "header"):
                self._record(row)
        self.complete = chunk[-1].kind == "close"
        self.records, self._next = chunk[-1].seq, chunk[-1].seq + 1
        self.changed_at = time.time()

    def _note(self, rows: list[Row], table: StepTable) -> frozenset[int]:
        """Take in steps; returns the records that are to be looked at more closely."""
        heads = table.heads
        self._buckets.add(table.steps, table.seqs, table.values)
        trained = (heads["rates"] > 0) & (heads["flags"] & OUTCOME == 0)
        for counts, name, words in ((self.actions, "action", ACTIONS), (self.levels, "level", LEVELS)):
            for code, count in zip(*np.unique(heads[name][trained], return_counts=True), strict=True):
                if code < len(words):
                    counts[words[code].value] += int(count)
        self._see(table)
        self.last_reason = _reason(rows[-1])
        return frozenset(table.seqs[_remarkable(rows, table)].tolist())

    def _see(self, table: StepTable) -> None:
        """Take in where the run stands after these steps."""
        heads, values = table.heads, table.values
        for column in range(len(COLUMNS)):
            known = np.flatnonzero(~np.isnan(values[:, column]))
            if len(known):
                self.latest[column] = values[known[-1], column]
        if self.first_step is None:
            self.first_step = int(table.steps[0])
        self.last_step = max(self.last_step, int(table.steps.max()))
        self.state = {name: int(heads[name][-1]) for name in self.state}
        self.recent.extend(zip(heads["level"][-RECENT:].tolist(), heads["proposed"][-RECENT:].tolist(), strict=True))

    def _remark(self, row: Row) -> None:
        assert isinstance(row.body, bytes)
        m, d = unpack(row.body, row.blob)
        if m.findings:
            self.findings.add(m.step, m.findings)
        self.detectors.update(e.detector for e in d.evidence if e.fired)
        if m.outcome is None and (event := of_step(row.seq, m, d)) is not None:
            self.events.add(event)

    def _record(self, row: Row) -> None:
        if (event := of_record(row)) is not None:
            self.events.add(event)
        elif row.kind == "outcome" and isinstance(target := row.data().get("restored_step"), int):
            self.events.restored(row.step, target)

    def stretch(self, low: int, high: int, points: int) -> Stretch:
        """The steps ``low`` to ``high`` in about ``points`` buckets; a close look reads the journal again.

        Raises
        ------
        JournalError
            The journal has vanished or is damaged, so that it cannot be looked at closely.
        """
        with self.lock:
            first, end = self._buckets.within(low, high)
            records = self._buckets.records(low, high)
            wide = self._buckets.width
            if wide == 1 or end - first >= points or records is None or records[1] - records[0] > CLOSEST:
                return self._buckets.stretch(low, high, points)
        closer = Buckets(len(COLUMNS), most=2 * points + 2, width=max(1, -(-(high - low + 1) // points)), start=low)
        decoder = Decoder(self.header.get("statistics", ()))
        with JournalReader(self.file, traceless=True) as reader:
            rows = (row for row in reader.rows(start=records[0] - MEMORY) if row.kind == "step")
            while (chunk := list(islice(rows, CHUNK))) and chunk[0].seq <= records[1]:
                table = decoder.decode(chunk)
                within = (table.steps >= low) & (table.steps <= high)
                closer.add(table.steps[within], table.seqs[within], table.values[within])
        return closer.stretch(low, high, points)

    @property
    def observes(self) -> bool:
        """Whether the supervisor only reports."""
        settings = self.header.get("settings")
        return isinstance(settings, dict) and settings.get("mode") == "observe"

    def value(self, name: str) -> float:
        """Last known value of a column; nan when there is none."""
        return float(self.latest[AT[name]])


def _remarkable(rows: list[Row], table: StepTable) -> NDArray[np.bool_]:
    """Rows that need a closer look: suspicious, acted upon, or with findings in their tail."""
    heads = table.heads
    chosen: NDArray[np.bool_] = (heads["level"] >= 2) | (heads["action"] > 0) | (heads["proposed"] > 0)
    for index in np.flatnonzero(heads["tail"] > 0).tolist():
        body = rows[index].body
        if isinstance(body, bytes) and b'"findings"' in body[-int(heads["tail"][index]) :]:
            chosen[index] = True
    return chosen


def _reason(row: Row) -> str:
    assert isinstance(row.body, bytes)
    head = HEAD.unpack_from(row.body)
    at = HEAD.size + 8 * head[11]
    return row.body[at : at + head[12]].decode("utf-8", "replace")
