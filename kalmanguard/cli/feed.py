"""Follows one run's journal: only the rows that are new, in bounded memory, and out of the writer's way."""

from __future__ import annotations

import math
import struct
import time
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from kalmanguard.cli.runstate import RunState, printable
from kalmanguard.errors import JournalError
from kalmanguard.journal.database import holds_run
from kalmanguard.journal.reader import JournalReader
from kalmanguard.journal.schema import Row, locate

_ATTEMPTS = 3


class Phase(StrEnum):
    """What there is to read."""

    WAITING = "waiting"
    READING = "reading"
    RUNNING = "running"
    CLOSED = "closed"
    VANISHED = "vanished"
    UNREADABLE = "unreadable"


class Feed:
    """Reads on in a run's journal with every `poll`.

    Parameters
    ----------
    path
        Run folder, or the journal's file; neither need exist yet.
    name
        What the run is called.

    Attributes
    ----------
    phase, trouble
        What there is to read, and the sentence that says why when there is nothing.
    run
        What is known of the run.
    speed
        Steps a second between the last two polls that saw new ones; ``None`` before that.

    Notes
    -----
    The database is opened read-only for each poll, read in short batches and let go of at once, so that the writer is
    not kept from folding its log, unless it closes in the middle of a poll. The first reading costs some 10 us a step:
    a long run is read in slices, with a picture between them.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, printable(name)
        self.phase, self.trouble = Phase.WAITING, f"Waiting for a journal in {self.name}; there is none yet."
        self.run = RunState()
        self.total = 0
        self.speed: float | None = None
        self._inode: int | None = None
        self._names: tuple[str, ...] = ()
        self._failures = 0
        self._written = 0.0
        self._seen: tuple[float, int] | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come, as far as can be told."""
        return self.phase in (Phase.CLOSED, Phase.VANISHED, Phase.UNREADABLE)

    @property
    def readable(self) -> bool:
        """Whether there is a run to show."""
        return self.phase in (Phase.READING, Phase.RUNNING, Phase.CLOSED)

    def poll(self, budget_s: float = math.inf) -> None:
        """Read what is new, for at most about ``budget_s``; what is left is read by the next polls."""
        file = locate(self.path)
        try:
            found, written = file.stat(), _written(file)
        except OSError as error:
            self._missing(error)
            return
        if self._inode not in (None, found.st_ino):
            self._begin_again("another run has begun in its place")
        self._inode = found.st_ino
        if self.phase is Phase.CLOSED and written == self._written:
            return  # many closed runs in a folder cost next to nothing
        self._written = written
        try:
            if holds_run(file):
                self._read(file, budget_s)
            self._failures = 0
        except (JournalError, OSError, struct.error, ValueError, TypeError, AttributeError, KeyError) as error:
            self._failed(error)

    def verify(self) -> None:
        """Derive the certificate of a closed run from its journal; some 10 us a record."""
        from kalmanguard.certificate.verify import UnreadableJournalError, verify

        try:
            self.run.verified = verify(self.path)
        except UnreadableJournalError as error:
            self.phase, self.trouble = Phase.UNREADABLE, printable(str(error))

    def _missing(self, error: OSError) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            if self._inode is not None:
                self.phase = Phase.VANISHED
                self.trouble = f"{self.name} has vanished: its journal was deleted or moved while it was watched."
            return
        self.phase = Phase.UNREADABLE
        self.trouble = f"{self.name} cannot be read: {error.strerror or error}."

    def _failed(self, error: Exception) -> None:
        # A run that was readable a moment ago may be closing just now: that is not yet damage.
        self._failures += 1
        if not self.readable or self._failures >= _ATTEMPTS:
            known = isinstance(error, JournalError)
            self.trouble = printable(str(error) if known else f"The journal of {self.name} is malformed ({error}).")
            self.phase = Phase.UNREADABLE

    def _begin_again(self, why: str) -> None:
        self.run, self.total, self.speed, self._seen = RunState(), 0, None, None
        self.phase = Phase.WAITING
        self.run.notes.append(f"{self.name}: {why}")

    def _read(self, file: Path, budget_s: float) -> None:
        ends = time.monotonic() + budget_s
        with JournalReader(file) as reader:
            self.total = len(reader)
            if self.total < self.run.records:
                self._begin_again("its journal was begun again")
                self.total = len(reader)
            run = self.run
            run.header, self._names = reader.header, reader.statistic_names
            for row in reader.rows(start=run.records + 1):
                self._take(row)
                if not row.seq % 256 and time.monotonic() > ends:
                    break
        run.silent_s = max(0.0, time.time() - self._written)
        behind = run.records < self.total
        self.phase = Phase.READING if behind else Phase.CLOSED if run.closed else Phase.RUNNING
        self.trouble = ""
        if not behind:
            self._measure_speed()

    def _measure_speed(self) -> None:
        now, step = time.monotonic(), self.run.step
        if self._seen is not None and step > self._seen[1] and now > self._seen[0]:
            self.speed = (step - self._seen[1]) / (now - self._seen[0])
        if self._seen is None or step != self._seen[1]:
            self._seen = now, step

    def _take(self, row: Row) -> None:
        self.run.take(row, self._names)


def _written(file: Path) -> float:
    """When the run last wrote, by the file system's clock."""
    times = [file.stat().st_mtime]
    with suppress(OSError):  # there is none once it is folded into the journal
        times.append(Path(f"{file}-wal").stat().st_mtime)
    return max(times)
