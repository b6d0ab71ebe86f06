"""Everything that is to be said about a recorded run, and about several of them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kalmanguard.analysis.estimates import Estimate, estimates
from kalmanguard.analysis.health import Health, Verdict, verdict
from kalmanguard.analysis.judgement import Event, Judgement
from kalmanguard.analysis.tables import printable
from kalmanguard.records import Action

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kalmanguard.analysis.trajectory import Stream, Trajectory
    from kalmanguard.settings import Settings

#: Rows between two events from which on they are told apart, as a share of the run, and at least.
_APART_FRAC, _APART = 0.005, 20
#: How bad a health is, for putting runs in order.
SEVERITY = {Health.DIVERGED: 3, Health.HARMED: 2, Health.WATCH: 1, Health.HEALTHY: 0, Health.UNKNOWN: -1}


class Incident(NamedTuple):
    """A stretch of events: its first and last step, how many rows, what was seen, and what would have been done.

    ``restore`` is the logged step of the state that the first rollback would have gone back to.
    """

    first: int
    last: int
    rows: int
    detectors: tuple[str, ...]
    message: str
    proposals: tuple[str, ...]
    restore: int | None

    @property
    def deed(self) -> str:
        """What a supervisor would have done, in words."""
        if Action.HALT in self.proposals:
            return "halt at the best certified state"
        if Action.ROLLBACK in self.proposals:
            return "roll back" + ("" if self.restore is None else f" to the state of step {self.restore:,}")
        if Action.VETO in self.proposals:
            return "drop the step"
        return "look once more at the held-out loss, no more"


@dataclass(frozen=True, eq=False)
class Analysis:
    """One run, judged and estimated.

    Attributes
    ----------
    name, path, format, notes
        Where it comes from, and what was noted when it was read.
    judgement
        What the engine said, row by row.
    verdict
        Its health now, the reasons, and advice.
    estimates
        What was estimated of it, with intervals; empty where that was not asked for.
    """

    name: str
    path: str
    format: str
    notes: tuple[str, ...]
    judgement: Judgement
    verdict: Verdict
    estimates: tuple[Estimate, ...] = ()

    @property
    def verb(self) -> str:
        """``did`` of a supervisor that was there and acted, else ``would``."""
        return "did" if self.format == "journal" and self.judgement.settings.mode == "protect" else "would"

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """Events that lie close together, as one."""
        return tuple(_incidents(self.judgement))

    def plot(self) -> Figure:
        """All panels: losses, gradient norm, innovations, progress lost."""
        from kalmanguard.analysis.figures import draw

        return draw(self.judgement)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, as plain values."""
        j = self.judgement
        return {
            "name": self.name,
            "path": self.path,
            "format": self.format,
            "notes": list(self.notes),
            "health": self.verdict.health.value,
            "reasons": list(self.verdict.reasons),
            "advice": list(self.verdict.advice),
            "rows": j.rows,
            "first_step": j.first_step,
            "last_step": j.last_step,
            "suspected": j.suspected,
            "confirmed": j.confirmed,
            "episodes": j.episodes,
            "held_out_readings": j.probes,
            "give_back": j.give_back,
            "levels": dict(j.levels),
            "proposals": dict(j.proposals),
            "channels": {name: _channel(j, name) for name in ("loss", "probe", "gradient_norm") if j.curves.get(name)},
            "unlisted_events": j.unlisted,
            "events": [_event(self.name, event) for event in j.events],
            "incidents": [incident._asdict() | {"deed": incident.deed} for incident in self.incidents],
            "estimates": [estimate._asdict() for estimate in self.estimates],
            "settings": j.settings.model_dump(mode="json"),
        }

    def __str__(self) -> str:
        j = self.judgement
        lines = [
            f"{self.name}: {self.verdict.health.value}. {' '.join(self.verdict.reasons)}",
            f"  {j.rows:,} rows, steps {j.first_step:,} to {j.last_step:,}; {j.suspected:,} suspicious, "
            f"{j.confirmed:,} confirmed",
        ]
        lines += [f"  steps {i.first:,} to {i.last:,}: {i.message}; {self.verb} {i.deed}" for i in self.incidents[:10]]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@dataclass(frozen=True, eq=False)
class Analyses:
    """Several runs, the ones in the worst state first."""

    runs: tuple[Analysis, ...]

    @property
    def health(self) -> Health:
        """Of the run in the worst state."""
        return max((run.verdict.health for run in self.runs), key=SEVERITY.__getitem__, default=Health.UNKNOWN)

    def counts(self) -> dict[str, int]:
        """How many runs have which health."""
        found = [run.verdict.health.value for run in self.runs]
        return {health.value: found.count(health.value) for health in Health if health.value in found}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: totals, then the runs."""
        runs = [run.to_dict() for run in self.runs]
        return {
            "health": self.health.value,
            "runs_by_health": self.counts(),
            "suspected": sum(run["suspected"] for run in runs),
            "confirmed": sum(run["confirmed"] for run in runs),
            "rows": sum(run["rows"] for run in runs),
            "events": [event for run in runs for event in run["events"]],
            "runs": [{key: value for key, value in run.items() if key != "events"} for run in runs],
        }

    def __str__(self) -> str:
        return "\n".join(str(run) for run in self.runs)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def analyze(trajectory: Trajectory | Stream, settings: Settings | None = None, *, estimate: bool = True) -> Analysis:
    """Judge a run with the live engine, and estimate what it is like.

    Parameters
    ----------
    trajectory
        The run, or a stream of it (`Trajectory.stream`), of which memory holds no more than the end.
    settings
        By default those that a journal was recorded under, for other logs the usual ones.
    estimate
        Also smooth, identify and test its end, which takes longer than judging does for short runs.

    Examples
    --------
    >>> import numpy as np
    >>> from kalmanguard.analysis.trajectory import Trajectory
    >>> rng, n = np.random.default_rng(0), np.arange(1500)
    >>> result = analyze(Trajectory.from_arrays(loss=2.0 + np.exp(-n / 300) + 0.05 * rng.normal(size=1500)))
    >>> result.verdict.health.value, result.judgement.confirmed
    ('HEALTHY', 0)
    """
    judged = trajectory.judge(settings)
    return Analysis(
        trajectory.name,
        printable(trajectory.source.path),
        trajectory.source.format,
        tuple(map(printable, trajectory.source.notes)),
        judged,
        verdict(judged),
        tuple(estimates(judged)) if estimate else (),
    )


def in_order(runs: Sequence[Analysis]) -> Analyses:
    """Put runs in order: the worst health first, then the most that was confirmed and suspected."""

    def rank(run: Analysis) -> tuple[float, ...]:
        j = run.judgement
        return -SEVERITY[run.verdict.health], -j.confirmed, -j.suspected / max(1, j.rows)

    return Analyses(tuple(sorted(runs, key=rank)))


def _incidents(j: Judgement) -> Iterator[Incident]:
    # What is told at every held-out reading belongs together, however rare they are.
    apart = max(_APART, _APART_FRAC * j.rows, 2.0 * j.rows / j.probes if j.probes else 0.0)
    group: list[Event] = []
    for event in j.events:
        if group and event.row - group[-1].row > apart:
            yield _incident(group)
            group = []
        group.append(event)
    if group:
        yield _incident(group)


def _incident(events: Sequence[Event]) -> Incident:
    done = [event for event in events if event.proposed != Action.ACCEPT]
    told = done[0] if done else events[0]
    return Incident(
        events[0].step,
        events[-1].step,
        len(events),
        tuple(dict.fromkeys(name for event in events for name in event.detectors)),
        told.message,
        tuple(dict.fromkeys(event.proposed for event in done)),
        next((event.restore for event in done if event.restore is not None), None),
    )


def _event(run: str, event: Event) -> dict[str, Any]:
    return {"run": run, **event._asdict()}


def _channel(j: Judgement, name: str) -> dict[str, Any]:
    curve = j.curves[name]
    best = curve.best if math.isfinite(curve.best) else None
    return {
        "count": curve.finite + curve.lost_count,
        "not_finite": curve.lost_count,
        "first": curve.first,
        "best": best,
        "best_step": curve.best_step,
        "last": curve.last,
    }
