"""The stability report: what was seen, what was done, what it cost, in plain text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kalmanguard.records import Action, Decision, Mode
from kalmanguard.settings import Settings

_WIDTH = 80
_LABEL = 16
_FIRST, _LAST = 10, 30


def render(
    statistics: Mapping[str, Any], last: Decision | None, settings: Settings, events: Sequence[tuple[int, str]]
) -> str:
    """Write the report of a run.

    Parameters
    ----------
    statistics
        As `Supervisor.statistics` gives them; what is missing is left out.
    last
        The last decision, ``None`` before the first.
    settings
        The settings of the run.
    events
        Step and reason of everything that was suspicious or undone, in order.

    Examples
    --------
    >>> text = render({"steps": 120, "vetoes": 1, "rollbacks": 0, "suspicions": 0}, None, Settings(), [])
    >>> print(text.splitlines()[3])
    Verdict         stable: 1 step dropped, nothing had to be undone
    """
    lines = ["kalmanguard: stability report", "=" * 29, ""]
    for label, text in _rows(statistics, last, settings):
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=f"{label:<{_LABEL}}", subsequent_indent=" " * _LABEL, break_on_hyphens=False
        )
    lines += ["", "What happened"]
    lines += list(_told(events)) or ["  Nothing suspicious."]
    return "\n".join(lines)


def _rows(s: Mapping[str, Any], last: Decision | None, settings: Settings) -> Iterator[tuple[str, str]]:
    yield "Verdict", _verdict(s, last)
    acting = "acts on what it finds" if settings.mode == "protect" else "only reports what it finds"
    yield "Steps", f"{s.get('steps', 0):,} supervised; mode {settings.mode}, which {acting}"
    if last is not None:
        yield "Last decision", f"{last.action.value}, {last.level.value}. {last.reason}"
    start, best = _number(s.get("first_probe")), _number(s.get("best_probe"))
    if start is not None and best is not None:
        yield "Held-out loss", f"{start:.4g} at the first probe, {best:.4g} at best: {start - best:.4g} gained"
    yield "Suspicions", f"{s.get('suspicions', 0):,} steps"
    dropped, undone = _count(s.get("vetoes", 0), "step"), _count(s.get("rollbacks", 0), "rollback")
    yield "Interventions", f"{dropped} dropped before being applied, {undone}"
    yield "Probes", f"{s.get('probes', 0):,}{_every(s.get('probe_every'))}"
    slots = list(s.get("snapshots", ()))
    certified = [slot["step"] for slot in slots if slot.get("certified")]
    held = f"; certified: steps {', '.join(f'{step:,}' for step in certified)}" if certified else ""
    yield "Snapshots", f"{len(slots)} in the ring{_every(s.get('snapshot_every'))}{held}"
    if "overhead_frac" in s:
        yield "Own cost", f"{100 * s['overhead_frac']:.1f} % of the time, probes, snapshots and journal included"
    lapsed = s.get("lapsed_probes", 0)
    if lapsed:
        yield "Envelope", f"LAPSED: {_count(lapsed, 'probe')} let pass outside it, as overfitting"
    elif not s.get("warm", True):
        yield "Envelope", "not in force yet: warm-up goes on"
    if s.get("errors"):
        yield "Own faults", f"{_count(s['errors'], 'fault')} inside the supervisor; see diagnose()"


def _verdict(s: Mapping[str, Any], last: Decision | None) -> str:
    vetoes, rollbacks = s.get("vetoes", 0), s.get("rollbacks", 0)
    if s.get("mode") == Mode.HALTED or (last is not None and last.action is Action.HALT):
        return f"halted after {_count(rollbacks, 'rollback')}; the best certified state is restored"
    if s.get("mode") == Mode.RECOVERING:
        return f"recovering: {_count(rollbacks, 'rollback')}, and not yet back to normal"
    if rollbacks:
        return f"recovered: {_count(rollbacks, 'rollback')}, {_count(vetoes, 'step')} dropped"
    watched = f"; {_count(s['suspicions'], 'suspicious step')}" if s.get("suspicions") else ""
    if vetoes:
        return f"stable: {_count(vetoes, 'step')} dropped, nothing had to be undone{watched}"
    return f"stable: nothing had to be dropped or undone{watched}"


def _told(events: Sequence[tuple[int, str]]) -> Iterator[str]:
    # How it began and how it ended say more than the middle of a long list.
    left_out = len(events) - _FIRST - _LAST
    for index, (_, reason) in enumerate(events):
        if left_out > 0 and _FIRST <= index < _FIRST + left_out:
            if index == _FIRST:
                yield f"  ... {left_out:,} more ..."
            continue
        yield from textwrap.wrap(
            reason, _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _every(steps: int | None) -> str:
    return "" if steps is None else f", one every {steps:,} steps" if steps > 1 else ", one every step"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
