"""How healthy a run is now, what happened on the way, and what to try: sentences from a judgement."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from kalmanguard.analysis.advice import ADVICE
from kalmanguard.analysis.judgement import Judgement
from kalmanguard.records import Action

#: Held-out losses that show how much of the progress is lost, however few rows there are.
_FEW_PROBES = 8
#: Training losses above the first one by this share of it are worth a word, and beyond this many times it an explosion,
#: unless it is next to nothing, as of policies.
_UNTRAINED_FRAC, _EXPLODED, _TINY = 0.25, 1_000.0, 1e-3
#: Dropped steps that mean nothing, as a scaler of half-precision losses makes them, at least and as a share.
_FEW_DROPPED, _DROPPED_FRAC = 3, 0.01
#: Detectors that see more than a held-out loss that rises.
_SHAKEN = frozenset(("loss", "gradient", "gain", "trajectory", "learning-rate", "loss-finite", "gradient-gate"))
#: Share of the rows at the end that "now" is, and how many at least.
_NOW_FRAC, _NOW_ROWS = 0.05, 50
#: Episodes per 1,000 rows, at the lower confidence bound, above which a run is rough.
_ROUGH = 2.0
#: Standard deviations of a Poisson count that are allowed for.
_DEVIATIONS = 2.0


class Health(StrEnum):
    """Of the run's end. HEALTHY: nothing is lost. WATCH: it is back, or rough. HARMED: progress is lost. DIVERGED:
    not finite, or worse than at the start. UNKNOWN: too short to tell.
    """

    HEALTHY = "HEALTHY"
    WATCH = "WATCH"
    HARMED = "HARMED"
    DIVERGED = "DIVERGED"
    UNKNOWN = "UNKNOWN"


class Verdict(NamedTuple):
    """The health, why in sentences, and what to try in sentences."""

    health: Health
    reasons: tuple[str, ...]
    advice: tuple[str, ...]


def verdict(judgement: Judgement) -> Verdict:
    """Sum a judgement up.

    Notes
    -----
    Guarantee: HEURISTIC. Harm is measured as everywhere here: the share of the progress that is lost, on held-out
    losses where there are any, against `Settings.give_back`. What is suspected and comes to nothing is no harm.

    Examples
    --------
    >>> from kalmanguard.analysis.judgement import judge
    >>> from kalmanguard.records import Measurement
    >>> falling = [2.0 + 2.0 * 0.99**n + 0.01 * (n * 7 % 5) for n in range(400)]
    >>> verdict(judge([Measurement(step=n, loss=y) for n, y in enumerate(falling, 1)], stand_in=True)).health
    <Health.HEALTHY: 'HEALTHY'>
    >>> lost = [*falling, *[float("nan")] * 40]
    >>> verdict(judge([Measurement(step=n, loss=y) for n, y in enumerate(lost, 1)], stand_in=True)).health
    <Health.DIVERGED: 'DIVERGED'>
    """
    health, reasons = _health(judgement)
    return Verdict(health, tuple(reasons), tuple(dict.fromkeys(_advice(judgement, health))))


def _health(j: Judgement) -> tuple[Health, list[str]]:
    if j.rows < j.settings.warmup_steps and j.probes < _FEW_PROBES:
        return Health.UNKNOWN, [
            f"{j.rows} rows are too few to tell: it takes {j.settings.warmup_steps}, or {_FEW_PROBES} held-out ones."
        ]
    if not any(j.curves.get(name) for name in ("loss", "probe", "gradient_norm")):
        return Health.UNKNOWN, ["There is neither a loss nor a gradient norm to judge by."]
    lost = _not_finite(j)
    if lost is not None:
        return Health.DIVERGED, [lost]
    what = "held-out" if j.probes else "training"
    standing, g, share = j.standing, j.give_back, j.settings.give_back
    first, last = _first_and_last(j)
    if last > _EXPLODED * max(abs(first), _TINY):
        return Health.DIVERGED, [f"The training loss at the end, {last:.4g}, is far above the first one, {first:.4g}."]
    if standing is not None and standing.y - standing.start > standing.allowance:
        return Health.DIVERGED, [
            f"The {what} loss at the end, {standing.y:.4g}, is worse than at the start, {standing.start:.4g}."
        ]
    if g > share and _overfits(j):
        return Health.WATCH, [
            f"The held-out loss has lost {100 * g:.0f} % of its progress while the training loss went on falling: "
            "overfitting, which no rollback mends."
        ]
    if g > share:
        return Health.HARMED, [
            f"The {what} loss at the end has lost {100 * g:.0f} % of the progress that was made; "
            f"{100 * share:.0f} % are allowed."
        ]
    reasons = []
    if last > first + _UNTRAINED_FRAC * abs(first):
        reasons.append(
            f"The training loss at the end, {last:.4g}, is above the first one, {first:.4g}: if training should lower "
            "it, the learning rate was too high from the start."
        )
    dropped = j.proposals.get(Action.VETO, 0)
    undone = j.confirmed - dropped
    if undone:
        reasons.append(f"Harm was confirmed in {_count(undone, 'row')}, and the run has come back.")
    if dropped > max(_FEW_DROPPED, _DROPPED_FRAC * j.rows):
        reasons.append(f"{_count(dropped, 'gradient')} were not finite, or far beyond any before.")
    now = max(_NOW_ROWS, int(_NOW_FRAC * j.rows))
    latest = [event for event in j.events if event.row > j.rows - now]
    if len(latest) > max(2, 0.05 * now):
        reasons.append(f"{_count(len(latest), 'row')} of the last {now:,} were suspicious.")
    if 1_000.0 * (j.episodes - _DEVIATIONS * math.sqrt(j.episodes)) / j.rows > _ROUGH:
        reasons.append(f"It was rough: {_count(j.episodes, 'stretch', 'stretches')} of suspicion in {j.rows:,} rows.")
    if standing is not None and not standing.progressed:
        reasons.append(f"The {what} loss has made no progress that stands out of its noise.")
    if reasons:
        return Health.WATCH, reasons
    quiet = (
        "Nothing was suspicious"
        if not j.suspected
        else f"{_count(j.suspected, 'row')} looked suspicious, none did harm"
    )
    if dropped:
        quiet += f"; {_count(dropped, 'gradient')} that should be skipped"
    gained = "" if math.isnan(g) else f"; {100 * g:.0f} % of the progress is lost at the end" if g >= 0.005 else (
        "; none of the progress is lost"
    )  # fmt: skip
    return Health.HEALTHY, [f"{quiet}{gained}."]


def _first_and_last(j: Judgement) -> tuple[float, float]:
    """First training loss and median of the last fifty; nan where there are too few. Held-out ones may begin late."""
    loss = j.curves.get("loss")
    tail = sorted(row.loss for row in j.recent[-50:] if row.loss is not None and math.isfinite(row.loss))
    if loss is None or not loss.finite or len(tail) < 10:
        return math.nan, math.nan
    return loss.first, tail[len(tail) // 2]


def _overfits(j: Judgement) -> bool:
    """Whether the training loss has fallen since the best held-out one, and nothing but that explains the rise."""
    probe, loss = j.curves.get("probe"), j.curves.get("loss")
    if not j.probes or probe is None or loss is None or not len(loss.steps):
        return False
    best = probe.best_step
    at_best = loss.mean[max(0, int(np.searchsorted(loss.steps, best, side="right")) - 1)]
    end = loss.mean[-max(1, len(loss.mean) // 20) :].mean()
    later = [event for event in j.events if event.step > best]
    told = any("overfitting" in event.detectors for event in later)
    shaken = any(_SHAKEN.intersection(event.detectors) for event in later)
    return bool(end < at_best) and (told or not shaken)


def _not_finite(j: Judgement) -> str | None:
    """A sentence when the run ends in values that are not finite; a single one that was skipped is no end."""
    loss = j.curves.get("loss")
    logged = [row.loss for row in j.recent[-16:] if row.loss is not None]
    if loss is not None and loss.lost and 2 * sum(not math.isfinite(y) for y in logged) > len(logged):
        return f"The training loss is not finite at the end; first at step {loss.lost[0]:,.0f}."
    probe = j.curves.get("probe")
    if probe is not None and j.probes and probe.ends_lost:
        return f"The held-out loss is not finite at the end; first at step {probe.lost[0]:,.0f}."
    return None


def _advice(j: Judgement, health: Health) -> Iterator[str]:
    counts: dict[str, int] = {}
    for event in j.events:
        for detector in event.detectors:
            counts[detector] = counts.get(detector, 0) + 1
    probe = j.curves.get("probe")
    if j.probes and probe is not None and probe.finite and (health is not Health.HEALTHY or "overfitting" in counts):
        yield f"The best held-out loss was {probe.best:.4g}, at step {probe.best_step:,.0f}: keep a checkpoint near it."
    rollback = next((e for e in reversed(j.events) if e.proposed in (Action.ROLLBACK, Action.HALT)), None)
    if health in (Health.HARMED, Health.DIVERGED) and rollback is not None and rollback.restore is not None:
        yield f"Go back to a checkpoint from step {rollback.restore:,} or before."
    if health in (Health.HEALTHY, Health.UNKNOWN):
        if "overfitting" in counts:
            yield ADVICE["overfitting"]
        if not j.probes and j.rows >= j.settings.warmup_steps:
            yield "Log a held-out loss now and then: without one, harm can only be told from the training loss."
        return
    # What confirmed harm first, then what was seen most often.
    for detector in sorted(counts, key=lambda name: (name not in ("envelope", "loss-finite"), -counts[name])):
        if detector in ADVICE:
            yield ADVICE[detector]


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or noun + 's'}"
