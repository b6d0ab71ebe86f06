"""What a journal says about its run, gathered in one pass."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kalmanguard.cli.story import Event, Point
from kalmanguard.journal.reader import JournalReader
from kalmanguard.records import Decision, Level, Measurement
from kalmanguard.settings import Settings


@dataclass
class RunSummary:
    """The run's facts; losses and probes as ``(step, value)``."""

    path: str
    records: int
    complete: bool
    header: dict[str, Any]
    changed_settings: dict[str, Any]
    origin: dict[str, Any] | None
    steps: int = 0
    last_decision: str = ""
    actions: dict[str, int] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)
    rollbacks: list[Point] = field(default_factory=list)
    probes: list[Point] = field(default_factory=list)
    losses: list[Point] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    envelope: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, the training losses left out."""
        data = asdict(self)
        del data["losses"]
        return data


def summarise(path: Path) -> RunSummary:
    """Read a journal.

    Raises
    ------
    JournalError
        There is none that this version can read.
    """
    with JournalReader(path) as reader:
        summary = RunSummary(
            path=str(reader.path),
            records=len(reader),
            complete=reader.complete,
            header=reader.header,
            changed_settings=_changed(reader.header.get("settings")),
            origin=_origin(reader.path.parent),
        )
        names = reader.statistic_names
        for row in reader.rows():
            if row.kind not in ("step", "header", "close"):
                _record(summary, row.kind, row.step, row.data())
        for measurement, decision in reader.steps():
            _step(summary, measurement, decision, dict(zip(names, decision.statistics, strict=False)))
    restored = dict(summary.rollbacks)
    for index, event in enumerate(summary.events):
        if event.step in restored and event.action in ("ROLLBACK", "HALT"):
            summary.events[index] = Event(
                event.step, event.action, event.level, event.reason, int(restored[event.step])
            )
    return summary


def _record(summary: RunSummary, kind: str, step: int, data: dict[str, Any]) -> None:
    if kind == "outcome" and data.get("restored_step") is not None:
        summary.rollbacks.append((step, data["restored_step"]))
    elif kind == "error":
        summary.errors.append(f"step {step}: {data.get('text', '')}")
    elif kind == "resume":
        how = "begun anew, for no checkpoint had been written" if data.get("anew") else "resumed from a checkpoint"
        summary.marks.append(f"step {step}: {how}")
    elif kind == "objective":
        summary.marks.append(f"step {step}: a new objective was declared")
    elif kind == "note" and "probe_examples" in data:
        summary.marks.append(f"step {step}: the probe was cut to {data['probe_examples']} examples, for its cost")
    elif kind == "note" and data.get("reset"):
        summary.marks.append(f"step {step}: the supervisor was reset")


def _step(summary: RunSummary, m: Measurement, decision: Decision, statistics: dict[str, float]) -> None:
    summary.steps = max(summary.steps, m.step)
    if m.probe is not None:
        summary.probes.append((m.step, m.probe.mean))
        envelope = {name: statistics.get(name, math.nan) for name in ("y0", "y_best", "bound")}
        if not math.isnan(envelope["y0"]):
            summary.envelope = envelope
    if m.outcome is not None or not m.learning_rates:
        return  # what follows a restore, or precedes the first step, is no step of training
    for counts, word in ((summary.actions, decision.action.value), (summary.levels, decision.level.value)):
        counts[word] = counts.get(word, 0) + 1
    summary.last_decision = decision.reason
    if m.loss is not None:
        summary.losses.append((m.step, m.loss))
    if decision.level in (Level.SUSPECT, Level.CONFIRMED):
        summary.events.append(Event.of(decision))


def _changed(recorded: object) -> dict[str, Any]:
    """Settings that are not the default ones."""
    usual = Settings().model_dump(mode="json")
    known = recorded if isinstance(recorded, dict) else {}
    return {key: value for key, value in known.items() if key not in usual or usual[key] != value}


def _origin(folder: Path) -> dict[str, Any] | None:
    """What `kalmanguard run` has noted about how the run was made."""
    try:
        data = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
