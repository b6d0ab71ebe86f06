"""Whether a run is healthy: one word, one sentence, and a yes or no for scripts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from kalmanguard.cli.terminal import duration, number
from kalmanguard.records import Action, Level, Mode

if TYPE_CHECKING:
    from kalmanguard.cli.runstate import RunState


class Health(NamedTuple):
    """A judgement; ``sound`` is what an exit code is made of."""

    word: str
    sound: bool
    sentence: str


#: What each word looks like; the word itself says it too, so that nothing rests on colour.
HEALTH_STYLES = {
    "HEALTHY": "bold green",
    "WARM-UP": "bold",
    "STARTING": "bold",
    "SUSPICIOUS": "bold yellow",
    "RECOVERING": "bold magenta",
    "OUTSIDE": "bold red",
    "FAILING": "bold red",
    "HALTED": "bold red",
    "SILENT": "bold yellow",
    "FAILED": "bold red",
    "WAITING": "dim",
    "VANISHED": "bold red",
    "UNREADABLE": "bold red",
}


def judge(run: RunState, *, silent_after_s: float) -> Health:
    """Judge a run by its last step, its last probe and the time since it last wrote.

    A rollback that was recovered from, or a step that was dropped, does not make a run unhealthy: that is what the
    supervisor is for. A suspicion does not either, since only a probe confirms harm.
    """
    if run.verified is not None and run.verified.exit_code == 1:
        return Health("FAILED", False, "The journal contradicts itself: see kalmanguard verify.")
    if run.mode == Mode.HALTED or run.action == Action.HALT:
        return Health("HALTED", False, "The recovery ladder is exhausted; training was told to stop.")
    if not run.closed and run.silent_s > silent_after_s:
        return Health(
            "SILENT", False, f"Nothing was written for {duration(run.silent_s)}: it hangs, or was killed unclosed."
        )
    if run.step == 0:
        return Health("STARTING", True, "No step of training yet.")
    if run.loss.last is not None and not math.isfinite(run.loss.last):
        return Health("FAILING", False, f"The training loss is not finite. {run.reason}")
    if run.action == Action.ROLLBACK or run.mode == Mode.RECOVERING:
        why = run.reason if run.action == Action.ROLLBACK else "A state was restored; it is not yet back to normal."
        return Health("RECOVERING", False, why)
    if run.level == Level.CONFIRMED and run.action != Action.VETO:
        return Health("FAILING", False, run.reason)
    probe = run.probe.last
    if probe is not None and (not math.isfinite(probe) or probe > run.bound):
        return Health("OUTSIDE", False, f"The last probe, {number(probe)}, is above its bound {number(run.bound)}.")
    if run.level in (Level.SUSPECT, Level.CONFIRMED):
        return Health("SUSPICIOUS", True, run.reason)
    if run.level == Level.WARMUP:
        return Health("WARM-UP", True, "Bounds are still being learned; only what is not finite is acted on.")
    return Health("HEALTHY", True, run.reason)
