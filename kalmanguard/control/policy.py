"""The policy: from evidence and a verdict to a decision with its orders. Accept, snapshot, roll back, halt."""

from __future__ import annotations

import math
from typing import NamedTuple

from kalmanguard.control.cadence import cadence
from kalmanguard.control.judgement import PROBES, Judge, Verdict
from kalmanguard.control.ladder import Ladder
from kalmanguard.control.ledger import Ledger
from kalmanguard.control.retention import SMALL_RING, Slot, to_evict
from kalmanguard.control.watch import HABIT
from kalmanguard.detectors.certain import certain, edits
from kalmanguard.detectors.dynamics import DynamicsState
from kalmanguard.detectors.excursion import RATIO, LearningRateExcursion
from kalmanguard.estimators.bank import Estimators, usual_gradient
from kalmanguard.records import (
    OVERWRITE,
    Action,
    Decision,
    Evidence,
    Guarantee,
    Level,
    Measurement,
    Mode,
    Orders,
)
from kalmanguard.settings import Settings

#: Dropped proposals in a row after which the state itself is not trusted any more.
_VETOES = 8


class Ruling(NamedTuple):
    """A decision, and the ledger after it."""

    ledger: Ledger
    decision: Decision


class Policy:
    """Decide what to do about a step; only a confirmed fault changes anything.

    Parameters
    ----------
    settings
        Cadences, gate, patience and the rollback budget.
    judge
        Says whether a restored run has come back.
    """

    def __init__(self, settings: Settings, judge: Judge) -> None:
        self._settings = settings
        self._judge = judge
        self._ladder = Ladder(budget=settings.rollback_budget, recovery_steps=settings.recovery_steps)

    # -- harm ----------------------------------------------------------------------------------------------------

    def harm(self, ledger: Ledger, m: Measurement, verdict: Verdict, evidence: tuple[Evidence, ...]) -> str:
        """Why this step must be undone, as a clause of a sentence; empty when it need not."""
        if is_restore(m):
            assert m.outcome is not None
            unproven = not m.outcome.manual and m.outcome.action is not Action.HALT and verdict.envelope is not None
            if verdict.harm or (unproven and not verdict.accepted):
                return f"the restored state of step {m.outcome.restored_step} is outside the envelope itself"
            return ""
        if verdict.harm:
            return verdict.harm
        if not m.parameters_finite:
            # Only an observing supervisor lets such a gradient through; a protecting one drops it, and needs no more.
            observed = m.veto == "nonfinite" and self._settings.mode == "observe"
            return "" if observed else "a parameter is not finite"
        if not ledger.warm:
            return self._stuck(ledger, m)
        if OVERWRITE in m.tampered:
            if m.veto in ("nonfinite", "explosion"):
                return "the parameters have moved by more than ten times their whole norm in a step that was dropped"
            if any(item.detector in ("gain", "trajectory") for item in evidence):
                return "one step has moved the parameters by more than ten times their whole norm"
        changed = edits(m)
        if changed and all(t.startswith("silent") for t in changed) and ledger.tampered <= 1:
            return f"{' and '.join(t.removeprefix('silent ') for t in changed)} changed without an optimizer step"
        if changed and verdict.broken and ledger.tampered <= HABIT:
            # A cause from outside, so there is nothing that heals by itself.
            what = " and ".join(dict.fromkeys(t.removeprefix("silent ") for t in changed))
            return f"{what} changed without an optimizer step, and the held-out loss {verdict.y:.4g} has left its bound"
        return self._stuck(ledger, m)

    def is_stuck(self, ledger: Ledger, m: Measurement) -> bool:
        """Whether so many proposals in a row were dropped that the state itself is not trusted any more."""
        skipped = ledger.skipped_in_a_row
        # Of gradients that are merely large, so many are dropped only while bad data is: else they would be clipped.
        limit = _VETOES if m.veto == "nonfinite" else max(_VETOES, self._settings.gate_skips + 1)
        return m.veto in ("nonfinite", "explosion") and skipped > 0 and skipped % limit == 0

    def _stuck(self, ledger: Ledger, m: Measurement) -> str:
        if self.is_stuck(ledger, m):
            why = (
                "not finite"
                if m.veto == "nonfinite"
                else f"dropped, the last with a gradient norm of {m.gradient_norm:.4g}"
            )
            return f"{ledger.skipped_in_a_row} proposed steps in a row were {why}"
        return ""

    # -- rollback ------------------------------------------------------------------------------------------------

    def restored(self, ledger: Ledger, m: Measurement) -> Ledger:
        """Take note that the actuators have restored a state of the ring."""
        assert m.outcome is not None
        assert m.outcome.restored_step is not None
        target, outcome = m.outcome.restored_step, m.outcome
        # Newer states that a probe has certified stay: the best of them is where a halt would go back to.
        slots = tuple(s for s in ledger.slots if s.certified or s.step <= target)
        level = next((s.level for s in slots if s.step == target), ledger.best)
        episode, ladder = ledger.episode, ledger.ladder
        mode = Mode.WATCHING
        if outcome.action is Action.HALT:
            mode = Mode.HALTED
        elif not outcome.manual:
            began = episode.onset if episode is not None else m.step
            mode, ladder = Mode.RECOVERING, self._ladder.climb(ladder, m.step, level, began)
        return ledger._replace(
            mode=mode,
            # An alarm that proved right does not raise the thresholds.
            tails=episode.tails if episode is not None and episode.tails is not None else ledger.tails,
            episode=None,
            proposed=False,
            declined=False,
            slots=slots,
            ladder=ladder,
            skipped_in_a_row=0,
            climbed=0,
            recent=(),
            dynamics=DynamicsState(tails=ledger.dynamics.tails),
            last_snapshot=m.step,
            last_probe=m.step,
        )

    def intervene(
        self,
        ledger: Ledger,
        m: Measurement,
        harm: str,
        y: float,
        bound: float,
        evidence: tuple[Evidence, ...],
        statistics: tuple[float, ...],
    ) -> Ruling | None:
        """Roll back or halt; ``None`` when no state in the ring is better than the present ``y`` (nan: any is).

        States whose own probe lies within ``bound`` go first.
        """
        slots = ledger.slots
        if is_restore(m):
            assert m.outcome is not None
            # What was just restored is itself harmed: it leaves the ring, and the next older one is tried.
            slots = tuple(s for s in slots if s.step != m.outcome.restored_step)
        rung = self._ladder.rung(ledger.ladder, m.step)
        onset = ledger.episode.onset if ledger.episode is not None else m.step
        if rung is None:
            began = min(onset, ledger.ladder.onset) if ledger.ladder.score else onset
            target = _last_refuge(slots, began, ledger.standard_error)
        else:
            target = _target(slots, onset, rung, y, bound)
        if target is None and math.isfinite(y) and not is_restore(m):
            return None
        reason = f"Step {m.step}: {harm}; the state of step {target} is restored (rung {rung} of the ladder)."
        if target is None:
            rung, reason = None, f"Step {m.step}: {harm}, and no state is left to restore."
        elif rung is None:
            reason = (
                f"Step {m.step}: {harm}, and the recovery ladder is exhausted after {ledger.ladder.rollbacks} "
                f"rollbacks{_advice(m)}; the best certified state, of step {target}, is restored and training halts."
            )
        # States from after the onset are not trusted, whatever their probes said; nor are newer unprobed ones.
        kept = tuple(
            s
            for s in slots
            if s.step == target or (s.certified and s.step <= onset) or s.step < min(onset, target or 0)
        )
        action = Action.HALT if rung is None else Action.ROLLBACK
        decision = Decision(
            m.step, action, action, Level.CONFIRMED, ledger.mode, reason,
            evidence or (Evidence("policy", math.nan, True, Guarantee.EXACT, harm),),
            certificate=status(ledger), statistics=statistics,
            orders=Orders(restore=target, rung=rung or 0, evict=_gone(ledger.slots, kept)),
        )  # fmt: skip
        return Ruling(ledger._replace(proposed=True, target=-1 if target is None else target, slots=kept), decision)

    # -- acceptance ----------------------------------------------------------------------------------------------

    def accept(
        self,
        ledger: Ledger,
        m: Measurement,
        verdict: Verdict,
        evidence: tuple[Evidence, ...],
        statistics: tuple[float, ...],
        *,
        estimators: Estimators,
    ) -> Ruling:
        """Let the step stand; say what the ring does, and what the next gradient may be."""
        certify: tuple[int, ...] = ()
        if is_restore(m) and verdict.accepted:
            assert m.outcome is not None
            certify = (m.outcome.restored_step or 0,)
            ledger = ledger._replace(
                slots=tuple(
                    s._replace(certified=True, level=verdict.level) if s.step in certify else s for s in ledger.slots
                ),
                ladder=ledger.ladder._replace(level=verdict.level),
            )
        release = self._recovered(ledger, m, verdict)
        lasting = release and ledger.ladder.cut and ledger.ladder.relapses > 0
        if release:
            ledger = ledger._replace(mode=Mode.WATCHING, ladder=self._ladder.released(ledger.ladder))
        if ledger.mode is Mode.WATCHING and ledger.ladder.score and ledger.episode is None:
            ledger = ledger._replace(ladder=self._ladder.settle(ledger.ladder, m.step))
        snapshot = False
        evict: tuple[int, ...] = ()
        if self._wants_snapshot(ledger, m, verdict):
            snapshot = True
            kept = ledger.slots
            gone = to_evict(kept, m.step, ledger.capacity, certified=verdict.accepted)
            evict = (*gone, *(s.step for s in kept if s.step == m.step))
            best = verdict.level if verdict.accepted else math.inf
            slot = Slot(m.step, verdict.accepted, best, suspect=ledger.episode is not None and m.outcome is None)
            ledger = ledger._replace(slots=(*(s for s in kept if s.step not in evict), slot), last_snapshot=m.step)
        gate, clip = self._gate(ledger, m, verdict, evidence, estimators)
        level = _level(ledger, m, verdict, evidence, self._settings.warmup_steps)
        action = Action.VETO if m.veto in ("nonfinite", "explosion") else Action.ACCEPT
        orders = Orders(
            snapshot=snapshot, certified=snapshot and verdict.accepted, certify=certify, evict=evict, gate=gate,
            clip=clip, release=release, lasting=lasting,
        )  # fmt: skip
        reason = _reason(m, level, verdict, evidence)
        if lasting:
            reason += (
                " The run has recovered, but it had failed again after its learning rate was given back: from now on "
                "it gets no more than the share that has worked."
            )
        decision = Decision(
            m.step, action, action, level, ledger.mode, reason, evidence,
            certificate=status(ledger), orders=orders, statistics=statistics,
        )  # fmt: skip
        return Ruling(ledger, decision)

    def _gate(
        self,
        ledger: Ledger,
        m: Measurement,
        verdict: Verdict,
        evidence: tuple[Evidence, ...],
        estimators: Estimators,
    ) -> tuple[float, bool]:
        """Largest gradient norm of the next step, and whether it is scaled down beyond that instead of dropped.

        A state that its probe finds good, but whose batch was suspected and is worse than for an untrained model, has
        met bad data: what is larger than any gradient from before is dropped then, for as long as such batches come
        one after the other.
        """
        settings, episode, largest = self._settings, ledger.episode, estimators.largest_gradient
        gate = settings.gate_ratio * largest if ledger.warm and largest > 0 else math.inf
        if ledger.warm and episode is not None and verdict.accepted and self._judge.is_hopeless(ledger, m):
            met = m.veto == "explosion" or any(item.detector == "loss" and item.fired for item in evidence)
            if met and episode.gradient < gate:
                return episode.gradient, False
        large = m.veto in ("explosion", "clipped") and ledger.skipped_in_a_row >= settings.gate_skips
        if large and math.isfinite(gate):
            # Scaled down to a typical norm, not to the gate: Adam remembers the square of it for a thousand steps.
            return min(largest, usual_gradient(estimators, 1.0)), True
        return gate, False

    def _recovered(self, ledger: Ledger, m: Measurement, verdict: Verdict) -> bool:
        return (
            ledger.mode is Mode.RECOVERING
            and verdict.accepted
            and self._ladder.recovered(ledger.ladder, m.step)
            and self._judge.is_back(ledger, verdict.y)
            # A learning rate that is still beyond what was certified would do its harm again.
            and LearningRateExcursion.ratio(ledger.excursion, m.learning_rates) <= RATIO
        )

    def _wants_snapshot(self, ledger: Ledger, m: Measurement, verdict: Verdict) -> bool:
        if (
            is_restore(m)
            or m.veto
            or not m.parameters_finite
            or (verdict.envelope is not None and not verdict.accepted)
        ):
            return False
        if m.outcome is not None and m.outcome.manual:
            return True
        if ledger.episode is not None and m.step > 0:
            # The first step of a suspicion, if its probe is better than what the ring holds: where a halt would want to
            # go back to.
            held = min((s.level for s in ledger.slots if s.certified), default=math.inf)
            first = m.step == ledger.episode.onset and ledger.capacity > SMALL_RING
            return first and verdict.accepted and verdict.level < held
        every = (ledger.cadence or cadence(self._settings, None)).snapshot_every
        # A probed state is worth more than the candidates since the last one, whatever their cadence.
        newest = max((s.step for s in ledger.slots if s.certified), default=-every)
        return not ledger.slots or m.step - (newest if verdict.accepted else ledger.last_snapshot) >= every


def is_restore(m: Measurement) -> bool:
    """Whether a measurement reports a state that the actuators have restored."""
    return m.outcome is not None and m.outcome.restored_step is not None


def status(ledger: Ledger) -> str:
    """The certificate's status, as far as it is known before the journal is verified."""
    return "LAPSED" if ledger.lapsed else "HOLDS"


def _gone(before: tuple[Slot, ...], after: tuple[Slot, ...]) -> tuple[int, ...]:
    kept = {s.step for s in after}
    return tuple(s.step for s in before if s.step not in kept)


def _target(slots: tuple[Slot, ...], onset: int, rung: int, y: float, bound: float) -> int | None:
    """The state to roll back to: before the onset, older on higher rungs.

    A state whose own probe was no better than ``y``, the present one, is never restored: doing nothing is better.
    """
    better = [s for s in slots if not s.certified or not math.isfinite(y) or s.level < y]
    # What was certified before there was progress may lie outside of what is allowed now.
    for choice in ([s for s in better if not s.certified or s.level <= bound], better):
        eligible = [s for s in choice if s.step < onset and not s.suspect and (rung == 0 or s.certified)]
        if eligible:
            return eligible[max(0, len(eligible) - 1 - rung)].step
    fallback = min((s for s in better if s.certified), key=lambda s: (s.suspect, s.level), default=None)
    return fallback.step if fallback is not None else None


def _advice(m: Measurement) -> str:
    """What a run that fails again and again has most likely wrong."""
    if m.lr_factor < 1.0:
        return f", the last at {m.lr_factor:.2g} of the learning rate that the loop asks for"
    return " (a learning rate that is too high fails again whenever it is given back)"


def _last_refuge(slots: tuple[Slot, ...], began: int, standard_error: float) -> int | None:
    """The state to halt at: the best certified one from before the trouble ``began``.

    A later one only if its probe is better by more than the noise: what the trouble did may not show in the probe.
    """
    certified = sorted((s for s in slots if s.certified), key=lambda s: s.level)
    if not certified:
        return slots[0].step if slots else None
    clean = next((s for s in certified if s.step < began and not s.suspect), certified[0])
    return (clean if clean.level <= certified[0].level + standard_error else certified[0]).step


def _level(ledger: Ledger, m: Measurement, verdict: Verdict, evidence: tuple[Evidence, ...], warmup: int) -> Level:
    if m.veto in ("nonfinite", "explosion"):
        return Level.CONFIRMED
    fired = any(item.fired for item in evidence)
    if not ledger.warm:
        # Without probes (a log that holds few or none) the trends alone must say when they know enough.
        unprobed = ledger.probes < PROBES and m.step - ledger.began > warmup
        return Level.SUSPECT if fired and (unprobed or certain(m)) else Level.WARMUP
    return Level.SUSPECT if fired or (verdict.envelope is not None and not verdict.accepted) else Level.NOMINAL


def _reason(m: Measurement, level: Level, verdict: Verdict, evidence: tuple[Evidence, ...]) -> str:
    if m.veto == "nonfinite":
        return f"Step {m.step}: the proposed update was dropped because its gradient is not finite."
    if m.veto == "explosion":
        return (
            f"Step {m.step}: the proposed update was dropped because its gradient norm {m.gradient_norm:.4g} is beyond "
            "the gate."
        )
    fired = next((item for item in evidence if item.fired), None)
    if verdict.envelope is not None:
        held = f"held-out loss {verdict.y:.4g}, bound {verdict.bound:.4g}"
        if level is Level.SUSPECT and fired is not None:
            return f"Step {m.step} is watched: {fired.message}; {held}."
        return f"Step {m.step} accepted: {held}."
    if fired is not None:
        return f"Step {m.step} is watched: {fired.message}."
    return f"Step {m.step} accepted: no innovation beyond its bound."
