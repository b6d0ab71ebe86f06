"""What is known of a run, put together from its records one by one, in bounded memory."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kalmanguard.cli.glimpse import Glimpse, glimpse
from kalmanguard.cli.story import Event
from kalmanguard.cli.trace import Trace
from kalmanguard.errors import JournalError
from kalmanguard.journal.codec import unpack
from kalmanguard.journal.schema import Row
from kalmanguard.records import Action, Decision, Level, Measurement, Mode

if TYPE_CHECKING:
    from kalmanguard.certificate.verify import Report

_EVENTS = 50
_MARKS = 2000


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

    def take(self, row: Row, names: tuple[str, ...]) -> None:
        """Take in the next record; ``names`` are those of the statistics, from the header.

        Raises
        ------
        JournalError
            The record is malformed.
        """
        self.closed = row.kind == "close"
        if self.verified is not None and not self.closed:
            self.verified = None  # it goes on after all
        if row.kind == "step":
            if not isinstance(row.body, bytes):
                raise JournalError(f"Record {row.seq} of the journal has no binary body.")
            if (seen := glimpse(row.body)) is not None:
                self._uneventful(seen)
            else:
                self._step(*unpack(row.body, row.blob), names)
        elif row.kind not in ("header", "close", "snapshot", "durable", "fresh", "intent"):
            self._rare(row.kind, row.step, row.data())
        self.records = row.seq  # last: a record that could not be read is none that was

    def _uneventful(self, seen: Glimpse) -> None:
        self.certificate = seen.certificate
        self._note(seen.step, seen.learning_rate, seen.lr_factor, seen.loss, seen.gradient_norm)
        self.action, self.level, self.mode = Action.ACCEPT, seen.level, seen.mode
        self.reason = printable(seen.reason.decode("utf-8", "replace"))

    def _note(self, step: int, rate: float, factor: float, loss: float | None, gradient: float | None) -> None:
        self.step = max(self.step, step)
        self.lr_factor = factor
        self.rate.add(step, rate * factor)
        if loss is not None:
            self.loss.add(step, loss)
        if gradient is not None:
            self.gradient.add(step, gradient)

    def _step(self, m: Measurement, d: Decision, names: tuple[str, ...]) -> None:
        self.certificate = d.certificate
        if m.probe is not None:
            self.probe.add(m.step, m.probe.mean)
            statistics = dict(zip(names, d.statistics, strict=False))
            if not math.isnan(statistics.get("y0", math.nan)):
                self.first_probe, self.best_probe = statistics["y0"], statistics.get("y_best", math.nan)
                self.bound = statistics.get("bound", math.inf)
        if m.outcome is not None or not m.learning_rates:
            self.mode = d.mode
            return  # what follows a restore, or precedes the first step, is no step of training
        self._note(m.step, m.learning_rates[0], m.lr_factor, m.loss, m.gradient_norm)
        self.action, self.level, self.mode, self.reason = d.action, d.level, d.mode, printable(d.reason)
        if d.action is Action.VETO:
            self.vetoes += 1
            self.marks.append((m.step, "V"))
        if d.level in (Level.SUSPECT, Level.CONFIRMED):
            self.suspicions += d.level is Level.SUSPECT
            self.event_count += 1
            self.events.append(Event(m.step, d.action.value, d.level.value, self.reason, d.restored_step))

    def _rare(self, kind: str, step: int, data: dict[str, Any]) -> None:
        if kind == "outcome" and data.get("restored_step") is not None:
            halted = data.get("action") == Action.HALT
            self.rollbacks += not halted
            self.halts += halted
            self.marks.append((step, "H" if halted else "R"))
        elif kind == "error":
            self.errors += 1
            self.notes.append(printable(f"fault inside the supervisor at step {step}: {data.get('text', '')}"))
        elif kind == "resume":
            self.resumes += 1
            self.marks.append((step, "S"))
            self.notes.append(f"step {step:,}: {'begun anew' if data.get('anew') else 'resumed from a checkpoint'}")
        elif kind == "objective":
            self.notes.append(f"step {step:,}: a new objective was declared")


def printable(text: str) -> str:
    """Text without what could steer a terminal: a journal may come from anyone.

    >>> printable(f"step 3{chr(27)}[2J")
    'step 3?[2J'
    """
    return text if text.isprintable() else "".join(sign if sign.isprintable() else "?" for sign in text)
