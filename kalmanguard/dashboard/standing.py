"""How a run stands: one word, one sentence, and what to do, from what has been read of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from kalmanguard.analysis.advice import ADVICE
from kalmanguard.dashboard.course import Course
from kalmanguard.journal.codec import MODES
from kalmanguard.records import Mode

#: Seconds without a new row after which a journal that was not closed is called silent.
SILENT_S = 60.0
#: Pieces of advice that are given at once.
_MOST = 4


class Word(StrEnum):
    """The state of a run.

    HEALTHY: nothing is wrong now. WARMING UP: too early for a verdict. SUSPICIOUS: something was suspected in the last
    50 steps. RECOVERING: a state was restored, and the run is not yet back to normal. HARMED: the last probe lies
    outside the envelope, or harm was confirmed and nothing done about it. HALTED: the supervisor has given up.
    UNREADABLE: the journal cannot be read. EMPTY: no step yet.
    """

    HEALTHY = "HEALTHY"
    WARMING_UP = "WARMING UP"
    SUSPICIOUS = "SUSPICIOUS"
    RECOVERING = "RECOVERING"
    HARMED = "HARMED"
    HALTED = "HALTED"
    UNREADABLE = "UNREADABLE"
    EMPTY = "EMPTY"


class Standing(NamedTuple):
    """The word, why in a sentence, whether the run goes on (``live``, ``silent``, ``closed``), and what to do."""

    word: Word
    text: str
    activity: str
    advice: tuple[str, ...]


def standing(course: Course, now: float | None = None) -> Standing:
    """Judge a run as it is now.

    Notes
    -----
    HEURISTIC: it repeats what the supervisor has decided, and adds no test of its own.
    """
    now = time.time() if now is None else now
    word, text = _word(course)
    return Standing(word, text, activity(course, now), tuple(_advice(course, word))[:_MOST])


def activity(course: Course, now: float) -> str:
    """Whether the run goes on."""
    if course.complete:
        return "closed"
    try:
        written = max(stamp for _, _, stamp in course.signature) / 1e9
    except ValueError:
        return "gone"
    return "live" if now - written < SILENT_S else "silent"


def _word(course: Course) -> tuple[Word, str]:
    if course.trouble is not None and not course.records:
        return Word.UNREADABLE, course.trouble
    if course.first_step is None:
        return Word.EMPTY, "The journal has been begun; no step has been written yet."
    mode = MODES[course.state["mode"]] if course.state["mode"] < len(MODES) else Mode.WATCHING
    done = _done(course)
    if mode is Mode.HALTED or course.state["action"] == 3:
        return Word.HALTED, f"The recovery ladder was exhausted and training was halted. {done}"
    if mode is Mode.RECOVERING:
        return Word.RECOVERING, f"An earlier state was restored; the run is watched until it is back to normal. {done}"
    if course.value("lost") == 1.0 and course.state["action"] == 0:
        return Word.HARMED, f"The last loss is not finite. {done}"
    y, bound = course.value("y"), course.value("bound")
    if y > bound:
        return Word.HARMED, f"The last held-out loss, {y:.4g}, lies above its bound, {bound:.4g}. {done}"
    if course.observes and any(proposed for _, proposed in course.recent):
        return Word.HARMED, f"Harm was found in the last steps. {done}"
    if course.state["level"] == 0:
        return Word.WARMING_UP, f"Warm-up goes on: the envelope is not in force yet. {done}"
    suspicious = sum(level >= 2 for level, _ in course.recent)
    if suspicious and not course.complete:
        steps = "step was" if suspicious == 1 else "steps were"
        return Word.SUSPICIOUS, f"{suspicious} of the last {len(course.recent)} {steps} suspicious. {done}"
    return Word.HEALTHY, f"{'The run ended with nothing wrong' if course.complete else 'Nothing is wrong now'}. {done}"


def _done(course: Course) -> str:
    if course.observes:
        confirmed = course.events.counts["CONFIRMED"]
        return f"Harm was confirmed in {confirmed:,} step{'s' * (confirmed != 1)}; nothing is done in observe mode."
    undone, dropped = course.events.counts["ROLLBACK"], course.events.counts["VETO"]
    if not undone and not dropped:
        return "Nothing had to be dropped or undone."
    parts = [f"{undone:,} rollback" + "s" * (undone != 1)] * bool(undone)
    parts += [f"{dropped:,} step{'s' * (dropped != 1)} dropped before {'they were' if dropped != 1 else 'it was'} "
              "applied"] * bool(dropped)  # fmt: skip
    return f"So far: {' and '.join(parts)}."


def _advice(course: Course, word: Word) -> Iterator[str]:
    if course.trouble is not None:
        yield course.trouble
    if word is Word.HALTED:
        yield (
            "The best certified state is restored. Look at the first rollback below, mend its cause, and resume from "
            "the last clean checkpoint."
        )
    if word is Word.HARMED and course.observes:
        yield "With mode = protect the supervisor would have acted by itself."
    if course.events.counts["ERROR"]:
        yield "The supervisor has reported faults of its own: look for ERROR among the events."
    if word in (Word.EMPTY, Word.UNREADABLE):
        return
    if word is Word.HEALTHY and any(name in ADVICE for name in course.detectors):
        yield "Nothing needs to be done now. Should what has been seen come again:"
    # What confirmed harm first, then what was seen most often.
    ranked = sorted(
        course.detectors, key=lambda name: (name not in ("envelope", "loss-finite"), -course.detectors[name])
    )
    for name in ranked:
        if name in ADVICE and (name != "envelope" or word is Word.HARMED):
            yield ADVICE[name]
