"""What happened in a run, as events with a sentence each, in bounded memory."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

from kalmanguard.journal.schema import Row
from kalmanguard.records import Action, Decision, Level, Measurement

#: Deeds that are kept (the first and the latest), and suspicions and notes (the latest).
KEPT_DEEDS, KEPT_OTHERS = 2_000, 2_000
#: Longest sentence that is shown; a journal from elsewhere can hold anything.
LONGEST = 2_000
DEEDS = ("ROLLBACK", "VETO", "HALT")


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    ``seq`` is the number of the journal's record, ``word`` what it is (``ROLLBACK``, ``VETO``, ``HALT``, ``CONFIRMED``,
    ``SUSPECT``, ``FINDING``, ``ERROR``, ``NOTE``), ``text`` the sentence, ``restored`` the step that was gone back to.
    """

    seq: int
    step: int
    word: str
    text: str
    restored: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def of_step(seq: int, m: Measurement, d: Decision) -> Event | None:
    """The event that a step is; ``None`` for one that was accepted in peace."""
    if d.action is not Action.ACCEPT:
        return Event(seq, m.step, d.action.value, shown(d.reason), d.restored_step)
    if d.proposed is not Action.ACCEPT:
        # The engine's sentence speaks of the deed as done.
        text = f"Proposed only ({d.proposed.value}), for the supervisor observes: {d.reason}"
        return Event(seq, m.step, Level.CONFIRMED.value, shown(text))
    if d.level in (Level.SUSPECT, Level.CONFIRMED):
        return Event(seq, m.step, d.level.value, shown(d.reason))
    if m.findings:
        more = f" ({len(m.findings) - 1} more in this step)" if len(m.findings) > 1 else ""
        return Event(seq, m.step, "FINDING", shown(f"Step {m.step}: {m.findings[0].message}{more}."))
    return None


def of_record(row: Row) -> Event | None:
    """The event that a rare record is; ``None`` for what only accompanies others.

    Raises
    ------
    JournalError
        The record has no JSON object for a body.
    """
    data, at = row.data(), f"Step {row.step}"
    if row.kind == "error":
        return Event(row.seq, row.step, "ERROR", shown(f"{at}, inside the supervisor: {data.get('text', '?')}"))
    if row.kind == "outcome" and data.get("error"):
        return Event(row.seq, row.step, "ERROR", shown(f"{at}: the restore failed: {data['error']}"))
    if row.kind == "outcome" and data.get("manual"):
        restored = data.get("restored_step")
        text = f"{at}: the state of step {restored} was restored by hand."
        return Event(row.seq, row.step, "ROLLBACK", shown(text), restored if isinstance(restored, int) else None)
    if row.kind == "resume":
        how = "begun anew, for no checkpoint had been written" if data.get("anew") else "resumed from a checkpoint"
        return Event(row.seq, row.step, "NOTE", f"{at}: the run was {how}.")
    if row.kind == "objective":
        return Event(row.seq, row.step, "NOTE", f"{at}: a new objective was declared; the envelope starts anew.")
    if row.kind == "fresh":
        verdict = "certified" if data.get("certified") else "not certified"
        return Event(row.seq, row.step, "NOTE", f"{at}: claim C3 was tested on fresh examples: {verdict}.")
    if row.kind == "close":
        return Event(row.seq, row.step, "NOTE", f"{at}: the run was closed.")
    return _note(row, data, at) if row.kind == "note" else None


def _note(row: Row, data: dict[str, Any], at: str) -> Event | None:
    if "probe_examples" in data:
        text = f"{at}: the probe was cut to {data['probe_examples']} examples, for its cost."
    elif data.get("reset"):
        text = f"{at}: the supervisor was reset."
    elif data.get("emergency"):
        text = f"{at}: the emergency protocol was called."
    elif "pause" in data:
        reason = data["pause"]
        text = f"{at}: supervision was paused ({reason})." if reason is not None else f"{at}: supervision goes on."
    else:
        return None
    return Event(row.seq, row.step, "NOTE", shown(text))


def shown(text: str) -> str:
    r"""A text that can be shown anywhere: no control characters, and of bounded length.

    >>> shown("rate \x1b[31m up")
    'rate ?[31m up'
    """
    cut = text[:LONGEST] + ("..." if len(text) > LONGEST else "")
    return cut if cut.isprintable() else "".join(c if c.isprintable() or c == " " else "?" for c in cut)


class EventLog:
    """Events in the order of the journal; deeds are kept apart, so that suspicions cannot crowd them out."""

    def __init__(self) -> None:
        self._first: list[Event] = []
        self._deeds: deque[Event] = deque(maxlen=KEPT_DEEDS // 2)
        self._others: deque[Event] = deque(maxlen=KEPT_OTHERS)
        self.counts: Counter[str] = Counter()

    def add(self, event: Event) -> None:
        """Take in one event."""
        self.counts[event.word] += 1
        if event.word not in DEEDS:
            self._others.append(event)
        elif len(self._first) < KEPT_DEEDS // 2:
            self._first.append(event)
        else:
            self._deeds.append(event)

    def restored(self, step: int, target: int) -> None:
        """Complete the latest deed: the state of step ``target`` was restored in ``step``."""
        kept: list[Event] | deque[Event] = self._deeds or self._first
        if kept and kept[-1].step == step and kept[-1].restored is None:
            last = kept[-1]
            kept[-1] = Event(last.seq, last.step, last.word, last.text, target)

    @property
    def total(self) -> int:
        """Number of events, with those that are no longer kept."""
        return self.counts.total()

    def latest(self, limit: int, before: int | None = None) -> list[Event]:
        """The last ``limit`` events, of those with a record before ``before``, in order."""
        kept = sorted((*self._first, *self._deeds, *self._others), key=lambda event: event.seq)
        if before is not None:
            kept = [event for event in kept if event.seq < before]
        return kept[-limit:]

    def marks(self, low: int, high: int, limit: int) -> list[Event]:
        """Events to be marked between two steps: all deeds first, then what else there is room for."""
        deeds = [event for event in (*self._first, *self._deeds) if low <= event.step <= high]
        room = max(0, limit - len(deeds))
        others = [event for event in self._others if low <= event.step <= high and event.word != "NOTE"]
        chosen = deeds[-limit:] + (others[-room:] if room else [])
        return sorted(chosen, key=lambda event: event.seq)
