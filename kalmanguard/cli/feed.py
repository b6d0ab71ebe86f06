"""Follows one run's journal: only the rows that are new, a bounded amount of memory, never in the writer's way."""

from __future__ import annotations

import math
import struct
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmanguard.cli.story import Event
from kalmanguard.cli.trace import Trace
from kalmanguard.errors import JournalError
from kalmanguard.journal.codec import unpack
from kalmanguard.journal.database import holds_run
from kalmanguard.journal.reader import JournalReader
from kalmanguard.journal.schema import Row, locate
from kalmanguard.records import Action, Decision, Level, Measurement, Mode

if TYPE_CHECKING:
    from kalmanguard.certificate.verify import Report

_EVENTS = 50
_MARKS = 2000
_ATTEMPTS = 3
#: A longer journal is verified by ``kalmanguard verify`` only: it would stop the picture for seconds.
VERIFIED_RECORDS = 200_000


class Phase(StrEnum):
    """What there is to read."""

    WAITING = "waiting"
    READING = "reading"
    RUNNING = "running"
    CLOSED = "closed"
    VANISHED = "vanished"
    UNREADABLE = "unreadable"


@dataclass
class RunState:
    """What is known of a run, as of its last record; ``closed`` once its writer has ended it."""

    header: dict[str, Any] = field(default_factory=dict)
    records: int = 0
    step: int = 0
    closed: bool = False
    silent_s: float = 0.0
    loss: Trace = field(default_factory=Trace)
    probe: Trace = field(default_factory=Trace)
    gradient: Trace = field(default_factory=Trace)
    rate: Trace = field(default_factory=Trace)
    lr_factor: float = 1.0
    first_probe: float = math.nan
    best_probe: float = math.nan
    bound: float = math.inf
    action: Action = Action.ACCEPT
    level: Level = Level.WARMUP
    mode: Mode = Mode.WATCHING
    reason: str = ""
    certificate: str = "HOLDS"
    verified: Report | None = None
    rollbacks: int = 0
    vetoes: int = 0
    suspicions: int = 0
    halts: int = 0
    resumes: int = 0
    errors: int = 0
    event_count: int = 0
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=_EVENTS))
    #: Step and letter of what is marked on the time line: R rollback, V veto, H halt, S resumed.
    marks: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=_MARKS))
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=3))

    @property
    def best(self) -> float | None:
        """Best accepted probe; `best_probe` is the best before the last one, which that one was judged by."""
        last = self.probe.last
        known = [self.best_probe, last if last is not None and last <= self.bound else math.nan]
        return min((value for value in known if math.isfinite(value)), default=None)

    @property
    def give_back(self) -> tuple[float, float]:
        """Share of the progress that the last probe has given back, and the share that may be; nan before there is any.

        With the first probe ``y0``, the best ``y_best``, the last ``y``: ``(y - y_best) / (y0 - y_best)``, and the same
        of the bound.
        """
        progress = self.first_probe - self.best_probe
        if self.probe.last is None or not progress > 0:
            return math.nan, math.nan
        return max(0.0, self.probe.last - self.best_probe) / progress, (self.bound - self.best_probe) / progress


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
    The database is opened read-only for each poll and let go of at once, in short reads: the writer is never kept from
    folding its log. About 30 us a step on the first reading; 1,000,000 steps take half a minute, in slices.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.phase, self.trouble = Phase.WAITING, f"Waiting for a journal in {name}; there is none yet."
        self.run = RunState()
        self.total = 0
        self.speed: float | None = None
        self._inode: int | None = None
        self._names: tuple[str, ...] = ()
        self._failures = 0
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
            found = file.stat()
        except OSError as error:
            self._missing(error)
            return
        if self._inode not in (None, found.st_ino):
            self._begin_again("another run has begun in its place")
        self._inode = found.st_ino
        try:
            if holds_run(file):
                self._read(file, budget_s)
            self._failures = 0
        except (JournalError, OSError, struct.error, ValueError, TypeError, AttributeError, KeyError) as error:
            self._failed(error)

    def verify(self) -> None:
        """Derive the certificate of a closed run from its journal, if that takes no longer than a moment."""
        from kalmanguard.certificate.verify import UnreadableJournalError, verify

        if self.run.closed and self.run.verified is None and self.run.records <= VERIFIED_RECORDS:
            try:
                self.run.verified = verify(self.path)
            except UnreadableJournalError as error:
                self.phase, self.trouble = Phase.UNREADABLE, str(error)

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
            self.trouble = str(error) if known else f"The journal of {self.name} is malformed ({error})."
            self.phase = Phase.UNREADABLE

    def _begin_again(self, why: str) -> None:
        self.run, self.total, self.speed, self._seen = RunState(), 0, None, None
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
                run.records = row.seq
                if not row.seq % 256 and time.monotonic() > ends:
                    break
        run.silent_s = max(0.0, time.time() - _written(file))
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
        run = self.run
        run.closed = row.kind == "close"
        if run.verified is not None and not run.closed:
            run.verified = None  # it goes on after all
        if row.kind == "step":
            if not isinstance(row.body, bytes):
                raise JournalError(f"Record {row.seq} of the journal has no binary body.")
            self._step(*unpack(row.body, row.blob))
        elif row.kind not in ("header", "close", "snapshot", "durable", "fresh", "intent"):
            self._rare(row.kind, row.step, row.data())

    def _step(self, m: Measurement, d: Decision) -> None:
        run = self.run
        run.certificate = d.certificate
        if m.probe is not None:
            run.probe.add(m.step, m.probe.mean)
            statistics = dict(zip(self._names, d.statistics, strict=False))
            if not math.isnan(statistics.get("y0", math.nan)):
                run.first_probe, run.best_probe = statistics["y0"], statistics.get("y_best", math.nan)
                run.bound = statistics.get("bound", math.inf)
        if m.outcome is not None or not m.learning_rates:
            run.mode = d.mode
            return  # what follows a restore, or precedes the first step, is no step of training
        run.step = max(run.step, m.step)
        run.action, run.level, run.mode, run.reason = d.action, d.level, d.mode, printable(d.reason)
        run.lr_factor = m.lr_factor
        run.rate.add(m.step, m.learning_rates[0] * m.lr_factor)
        if m.loss is not None:
            run.loss.add(m.step, m.loss)
        if m.gradient_norm is not None:
            run.gradient.add(m.step, m.gradient_norm)
        if d.action is Action.VETO:
            run.vetoes += 1
            run.marks.append((m.step, "V"))
        if d.level in (Level.SUSPECT, Level.CONFIRMED):
            run.suspicions += d.level is Level.SUSPECT
            run.event_count += 1
            run.events.append(Event(m.step, d.action.value, d.level.value, run.reason, d.restored_step))

    def _rare(self, kind: str, step: int, data: dict[str, Any]) -> None:
        run = self.run
        if kind == "outcome" and data.get("restored_step") is not None:
            halted = data.get("action") == Action.HALT
            run.rollbacks += not halted
            run.halts += halted
            run.marks.append((step, "H" if halted else "R"))
        elif kind == "error":
            run.errors += 1
            run.notes.append(printable(f"fault inside the supervisor at step {step}: {data.get('text', '')}"))
        elif kind == "resume":
            run.resumes += 1
            run.marks.append((step, "S"))
            run.notes.append(f"step {step:,}: {'begun anew' if data.get('anew') else 'resumed from a checkpoint'}")
        elif kind == "objective":
            run.notes.append(f"step {step:,}: a new objective was declared")


def printable(text: str) -> str:
    """Text without what could steer a terminal: a journal may come from anyone.

    >>> printable(f"step 3{chr(27)}[2J")
    'step 3?[2J'
    """
    return text if text.isprintable() else "".join(sign if sign.isprintable() else "?" for sign in text)


def _written(file: Path) -> float:
    """When the run last wrote, by the file system's clock."""
    times = [file.stat().st_mtime]
    with suppress(OSError):  # there is none once it is folded into the journal
        times.append(Path(f"{file}-wal").stat().st_mtime)
    return max(times)
