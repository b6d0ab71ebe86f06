"""Replay: fold a journal's measurements through the engine again, and compare every decision bit for bit."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from kalmanguard import statefile
from kalmanguard.engine import STATISTICS, Engine, EngineState
from kalmanguard.errors import ConfigurationError, JournalError
from kalmanguard.journal.codec import pack, unpack
from kalmanguard.journal.reader import JournalReader
from kalmanguard.journal.schema import Row
from kalmanguard.records import Action, Decision, Measurement
from kalmanguard.settings import Settings

#: Differing records that a report lists one by one; all of them are counted.
SHOWN = 1000


@dataclass(frozen=True, slots=True)
class Difference:
    """The first field in which a decision comes out otherwise than it was recorded.

    Attributes
    ----------
    record, step
        The journal's record and the step that it is about.
    field
        Such as ``action``, ``orders.restore``, ``evidence[0].message`` or ``statistics.z_loss``.
    recorded, replayed
        The two values.
    """

    record: int
    step: int
    field: str
    recorded: object
    replayed: object

    def __str__(self) -> str:
        return f"step {self.step} (record {self.record}): {self.field} is {self.replayed!r}, recorded {self.recorded!r}"


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay has found.

    Attributes
    ----------
    path
        The journal.
    decisions
        Number of decisions that were made again.
    differing
        How many of them differ from the record; in a what-if, in what is proposed or in the level.
    differing_actions
        How many differ in what is proposed: the measure that holds across builds of numpy and Python.
    differences
        The first field of each differing decision, in order, the first `SHOWN` of them.
    what_if
        Whether settings other than the recorded ones were used.
    recorded, replayed
        How often each proposed action and each level occurs.
    unseen_probes
        In a what-if, steps at which these settings would have taken a probe that the run did not take.
    notes
        What the comparison should be read with.
    """

    path: str
    decisions: int
    differing: int
    differing_actions: int
    differences: tuple[Difference, ...]
    what_if: bool
    recorded: Mapping[str, int]
    replayed: Mapping[str, int]
    unseen_probes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether every decision is as recorded."""
        return self.differing == 0

    @property
    def first(self) -> Difference | None:
        """The first difference."""
        return self.differences[0] if self.differences else None

    @property
    def exit_code(self) -> int:
        """0 if every decision is as recorded, else 1; a what-if always ends with 0."""
        return 0 if self.identical or self.what_if else 1

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; numbers that JSON does not have become strings."""
        return {
            "path": self.path,
            "decisions": self.decisions,
            "identical": self.identical,
            "differing": self.differing,
            "differing_actions": self.differing_actions,
            "what_if": self.what_if,
            "recorded": dict(self.recorded),
            "replayed": dict(self.replayed),
            "unseen_probes": self.unseen_probes,
            "differences": [
                {
                    "record": d.record,
                    "step": d.step,
                    "field": d.field,
                    "recorded": _json_value(d.recorded),
                    "replayed": _json_value(d.replayed),
                }
                for d in self.differences
            ],
            "notes": list(self.notes),
            "exit_code": self.exit_code,
        }

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.decisions:,} decisions made again"]
        if self.what_if:
            lines.append(f"With these settings {self.differing:,} of them differ in what is proposed or in the level.")
        elif self.identical:
            lines.append("All of them are bit for bit what was recorded.")
        else:
            lines.append(f"{self.differing:,} of them differ; {self.differing_actions:,} in what was proposed.")
        if self.first is not None:
            lines.append(f"First difference: {self.first}.")
        return "\n".join([*lines, *self.notes])


def replay(
    path: str | Path, settings: Settings | None = None, *, progress: Callable[[int, int], object] | None = None
) -> ReplayReport:
    """Make every decision of a run again from what its journal says was measured.

    Parameters
    ----------
    path
        Run folder, or the journal's file.
    settings
        Other settings than the recorded ones, for a what-if: compared are the proposed action and the level.
    progress
        Called now and then with the records done and their total number.

    Raises
    ------
    JournalError
        There is no journal that this version can read, or its settings are not ones that this version has.

    Notes
    -----
    Bit-identical on the build that recorded (EXACT); across builds of numpy and Python the last bits of some statistics
    may differ, the actions do not. What the training did cannot be made again from a journal: in a what-if everything
    after the first intervention that differs is judged on measurements of the run as it was. The journal's own chain is
    not checked here; `kalmanguard.certificate.verify` does that. About 60 us a step, 200 us a probe.

    Examples
    --------
    >>> import tempfile
    >>> from kalmanguard.journal import JournalWriter
    >>> from kalmanguard.records import Measurement
    >>> engine, folder = Engine(Settings()), tempfile.mkdtemp()
    >>> state = engine.init()
    >>> with JournalWriter(folder) as journal:
    ...     header = {"format": 1, "settings": Settings().model_dump(mode="json"), "statistics": list(STATISTICS)}
    ...     journal.write_header(header)
    ...     for step in range(1, 4):
    ...         measurement = Measurement(step=step, loss=2.0 / step, learning_rates=(0.1,))
    ...         state, decision = engine.step(state, measurement)
    ...         journal.step(measurement, decision)
    >>> report = replay(folder)
    >>> report.identical, report.decisions
    (True, 3)
    """
    with JournalReader(path) as reader:
        fold = _Fold(reader.header, settings)
        total = len(reader)
        for row in reader.rows():
            fold.take(row)
            if progress is not None and row.seq % 64 == 0:
                progress(row.seq, total)
        if progress is not None:
            progress(total, total)
        return fold.report(str(reader.path), reader.header)


class _Fold:
    """The engine on its way through the journal, and what has been found so far."""

    def __init__(self, header: Mapping[str, Any], other: Settings | None) -> None:
        self._other = other
        self._names = tuple(str(name) for name in header.get("statistics", ()))
        self._start(header.get("settings"))
        self._state: EngineState = self._engine.init()
        self._decisions = self._differing = self._actions = self._unseen = 0
        self._differences: list[Difference] = []
        self._recorded: Counter[str] = Counter()
        self._replayed: Counter[str] = Counter()

    def take(self, row: Row) -> None:
        if row.kind == "step":
            if not isinstance(row.body, bytes):
                raise JournalError(f"Record {row.seq} of the journal has no binary body.")
            self._decide(row, *unpack(row.body, row.blob))
        elif row.kind == "note" and row.data().get("reset"):
            self._state = self._engine.init(began=int(row.data().get("began", 0)))
        elif row.kind == "resume":
            self._resume(row)

    def report(self, path: str, header: Mapping[str, Any]) -> ReplayReport:
        return ReplayReport(
            path=path,
            decisions=self._decisions,
            differing=self._differing,
            differing_actions=self._actions,
            differences=tuple(self._differences),
            what_if=self._other is not None,
            recorded=dict(self._recorded),
            replayed=dict(self._replayed),
            unseen_probes=self._unseen,
            notes=tuple(self._notes(header)),
        )

    def _start(self, recorded: object) -> None:
        try:
            settings = Settings(**recorded) if isinstance(recorded, dict) else None
        except ConfigurationError as error:
            raise JournalError(
                f"The run was made with settings that this version does not have ({error}): replay it with the version "
                "that recorded it."
            ) from None
        if settings is None:
            raise JournalError("The journal's header holds no settings, so its decisions cannot be made again.")
        self._observes = settings.mode == "observe"
        self._engine = Engine(settings if self._other is None else self._other)

    def _resume(self, row: Row) -> None:
        data = row.data()
        if data.get("settings") is not None:
            self._start(data["settings"])
        if not isinstance(data.get("engine"), str):
            raise JournalError(f"Record {row.seq} resumes a run without the state that it was resumed from.")
        self._state = statefile.load(data["engine"])

    def _decide(self, row: Row, m: Measurement, recorded: Decision) -> None:
        foresight = self._engine.observe(self._state, m)
        self._state, made = self._engine.decide(foresight, m.probe)
        self._decisions += 1
        if self._other is not None:
            self._unseen += foresight.wants_probe and m.probe is None
            self._recorded.update((recorded.proposed.value, recorded.level.value))
            self._replayed.update((made.proposed.value, made.level.value))
            if made.proposed is not recorded.proposed or made.level is not recorded.level:
                field = "level" if made.proposed is recorded.proposed else "proposed"
                self._found(row, m, field, getattr(recorded, field), getattr(made, field))
            return
        made = _in_mode(made, m, recorded, observes=self._observes)
        self._recorded.update((recorded.proposed.value, recorded.level.value))
        self._replayed.update((made.proposed.value, made.level.value))
        if pack(m, made) == (row.body, row.blob):
            return
        difference = next(_differing(recorded, made, self._names), None)
        if difference is not None:  # else only the sign or the payload of a nan, which mean nothing
            if made.proposed is not recorded.proposed:
                difference = "proposed", recorded.proposed, made.proposed
            self._found(row, m, *difference)

    def _found(self, row: Row, m: Measurement, field: str, recorded: object, replayed: object) -> None:
        self._differing += 1
        self._actions += field == "proposed"
        if len(self._differences) < SHOWN:
            self._differences.append(Difference(row.seq, m.step, field, _plain(recorded), _plain(replayed)))

    def _notes(self, header: Mapping[str, Any]) -> Iterator[str]:
        if self._names != STATISTICS:
            yield "The statistics of the recording engine are not those of this one: it was another version."
        if self._other is not None and self._actions:
            yield (
                "After the first intervention that differs, decisions are judged on measurements of the run as it was, "
                "not of a run under these settings."
            )
        if self._unseen:
            yield f"These settings would have taken {self._unseen:,} probes that the run did not take."
        environment = header.get("environment")
        numpy = environment.get("numpy") if isinstance(environment, dict) else None
        if self._differing and self._other is None and numpy not in (None, np.__version__):
            yield f"It was recorded with numpy {numpy}, this is {np.__version__}: last bits of statistics may differ."


def _in_mode(made: Decision, m: Measurement, recorded: Decision, *, observes: bool) -> Decision:
    """Give a decision the action that the run's mode makes of it: in observe mode nothing is done but accept."""
    if not observes or made.action is Action.ACCEPT:
        return made
    # What is asked for by hand, or before the first step, may be recorded as the engine proposed it.
    supervised = m.outcome is None and m.learning_rates
    return replace(made, action=Action.ACCEPT) if supervised or recorded.action is Action.ACCEPT else made


_Field = tuple[str, object, object]


def _differing(recorded: Decision, made: Decision, names: tuple[str, ...]) -> Iterator[_Field]:
    """Fields that differ, what matters most first."""
    for name in ("step", "action", "proposed", "level", "mode", "restored_step", "certificate"):
        yield from _unless_same(name, getattr(recorded, name), getattr(made, name))
    for item in fields(recorded.orders):
        yield from _unless_same(
            f"orders.{item.name}", getattr(recorded.orders, item.name), getattr(made.orders, item.name)
        )
    for index, pair in enumerate(zip_longest(recorded.statistics, made.statistics)):
        yield from _unless_same(f"statistics.{names[index] if index < len(names) else index}", *pair)
    if len(recorded.evidence) != len(made.evidence):
        yield "evidence", [e.detector for e in recorded.evidence], [e.detector for e in made.evidence]
    for index, (one, other) in enumerate(zip(recorded.evidence, made.evidence, strict=False)):
        for item in fields(one):
            yield from _unless_same(
                f"evidence[{index}].{item.name}", getattr(one, item.name), getattr(other, item.name)
            )
    yield from _unless_same("reason", recorded.reason, made.reason)


def _unless_same(name: str, one: object, other: object) -> Iterator[_Field]:
    if isinstance(one, float) and isinstance(other, float):
        # Bits, so that 0.0 is not -0.0; but every nan is the same.
        same = struct.pack("<d", one) == struct.pack("<d", other) or (math.isnan(one) and math.isnan(other))
    else:
        same = one == other
    if not same:
        yield name, one, other


def _plain(value: object) -> object:
    return value.value if hasattr(value, "value") else value


def _json_value(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
