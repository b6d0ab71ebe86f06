"""What the interface answers, as JSON: a run's summary, and stretches of its columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from kalmanguard.dashboard.buckets import Stretch
from kalmanguard.dashboard.certificates import Certificate
from kalmanguard.dashboard.columns import COLUMNS
from kalmanguard.dashboard.events import shown
from kalmanguard.dashboard.library import Entry
from kalmanguard.dashboard.standing import standing
from kalmanguard.journal.codec import LEVELS, MODES
from kalmanguard.records import FloatArray

#: Version of the interface, in every address and every answer.
VERSION: Final = 1
_SEVERITY = ("FAILED", "INCOMPLETE", "LAPSED", "VACUOUS", "NOT CLAIMED", "HOLDS")
_DIGITS = 6


def encode(data: dict[str, Any]) -> bytes:
    """JSON, with the version; null for what is not finite."""
    return json.dumps({"version": VERSION} | data, separators=(",", ":"), default=str).encode()


def brief(entry: Entry) -> dict[str, Any]:
    """One line of the list of runs."""
    course = entry.course
    with course.lock:
        state = standing(course)
        return {
            "id": entry.key,
            "name": entry.name,
            "word": state.word.value,
            "activity": state.activity,
            "step": course.last_step,
        }


def summary(entry: Entry, certificate: Certificate) -> dict[str, Any]:
    """How a run stands, without its curves and events."""
    course = entry.course
    with course.lock:
        state = standing(course)
        settings = _dict(course.header.get("settings"))
        return {
            "id": entry.key,
            "name": entry.name,
            "revision": course.revision,
            "word": state.word.value,
            "text": state.text,
            "activity": state.activity,
            "advice": list(state.advice),
            "trouble": course.trouble,
            "records": course.records,
            "behind": course.behind,
            "first_step": course.first_step or 0,
            "step": course.last_step,
            "level": LEVELS[min(course.state["level"], len(LEVELS) - 1)].value,
            "mode": MODES[min(course.state["mode"], len(MODES) - 1)].value,
            "counts": dict(course.events.counts),
            "levels": dict(course.levels),
            "events": course.events.total,
            "findings": course.findings.count,
            "durable": course.kinds["durable"],
            "last_decision": shown(course.last_reason),
            "latest": {name: finite(value) for name, value in zip(COLUMNS, course.latest.tolist(), strict=True)},
            "settings": {
                "mode": settings.get("mode") if settings.get("mode") in ("protect", "observe") else None,
                "give_back": _number(settings.get("give_back")),
                "suspicion": _number(settings.get("suspicion")),
            },
            "model": _model(course.header),
            "certificate": _standing_of(certificate, course.records),
        }


def series(stretch: Stretch, revision: int) -> dict[str, Any]:
    """Columns of a stretch; ``high`` is left out where it is the same as ``low``, columns without a value entirely."""
    columns: dict[str, Any] = {}
    for index, name in enumerate(COLUMNS):
        low, high = stretch.low[:, index], stretch.high[:, index]
        if np.isnan(low).all():
            continue
        columns[name] = {"low": numbers(low)}
        if not np.array_equal(low, high, equal_nan=True):
            columns[name]["high"] = numbers(high)
    return {"revision": revision, "width": stretch.width, "steps": stretch.steps.tolist(), "columns": columns}


def numbers(values: FloatArray) -> list[float | None]:
    """Numbers in six significant digits, null for nan."""
    return [None if x != x else float(f"{x:.{_DIGITS}g}") for x in values.tolist()]


def finite(value: object) -> float | None:
    """A number that JSON has, or ``None``."""
    return value if isinstance(value, float) and math.isfinite(value) else None


def cleaned(value: Any) -> Any:
    """The same with ``None`` for every number that is not finite, at any depth."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return {key: cleaned(item) for key, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list | tuple) else value


def _standing_of(certificate: Certificate, records: int) -> dict[str, Any]:
    claims: Iterable[dict[str, Any]] = certificate.report["claims"] if certificate.report else ()
    counts: dict[str, int] = {}
    for claim in claims:
        counts[claim["status"]] = counts.get(claim["status"], 0) + 1
    return {
        "counts": {word: counts[word] for word in _SEVERITY if word in counts},
        "pending": certificate.pending,
        "stale": certificate.records != records,
        "made_at": int(certificate.made_at) or None,
    }


def _model(header: dict[str, Any]) -> str:
    model, probe = _dict(header.get("model")), _dict(header.get("probe"))
    size = model.get("parameters")
    parameters = f"{size:,} parameters" if isinstance(size, int) else "size unknown"
    return shown(f"{model.get('type', 'unknown model')}, {parameters}, probe of {probe.get('n', '?')} examples")[:300]


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    return finite(float(value)) if isinstance(value, int | float) else None
