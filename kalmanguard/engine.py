"""The pure fold: ``step(state, measurement) -> (state, decision)``, the same for live runs, replay and what-if.

No torch, no clock, no files: everything that it may know arrives in the `Measurement`. The state has two halves:
`Estimators` are rewound with a rollback, one copy per ring slot; the `Ledger` never is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from kalmanguard.control.cadence import cadence
from kalmanguard.control.judgement import Judge, Verdict
from kalmanguard.control.ledger import Ledger, restarted
from kalmanguard.control.policy import Policy, is_restore, status
from kalmanguard.control.retention import Slot
from kalmanguard.control.watch import Watch
from kalmanguard.detectors.certain import edits
from kalmanguard.detectors.drift import DriftResult
from kalmanguard.estimators.bank import EstimatorBank, Estimators, Innovations
from kalmanguard.estimators.probe import ProbeState
from kalmanguard.estimators.trend import TrendState
from kalmanguard.records import Action, Decision, Evidence, Innovation, Level, Measurement, Mode, ProbeReading
from kalmanguard.settings import Settings

#: Names of `Decision.statistics`, in order; the journal's header repeats them.
STATISTICS = (
    "y", "predicted", "scale", "level", "y0", "y_best", "bound", "allowance", "allowance_se", "accepted",
    "drift_x", "drift_m", "drift_alarm", "drift_reset",
    "z_loss", "z_gradient", "z_gain", "z_buffers", "z_trajectory", "nis", "rank", "speed", "loss_level",
)  # fmt: skip


class EngineState(NamedTuple):
    """The fold's whole state; ``saved`` holds one copy of the estimators per ring slot."""

    estimators: Estimators = Estimators()
    ledger: Ledger = Ledger()
    saved: tuple[tuple[int, Estimators], ...] = ()


class Foresight(NamedTuple):
    """What is known of a step before its probe; ``wants_probe`` says whether one should be taken.

    ``adopt``: the state that was captured right before the step enters the ring.
    """

    state: EngineState
    measurement: Measurement
    evidence: tuple[Evidence, ...] = ()
    innovations: Innovations = Innovations()
    drift: DriftResult | None = None
    wants_probe: bool = False
    adopt: bool = False


class Engine:
    """Estimators, detectors and policy, composed.

    Parameters
    ----------
    settings
        Thresholds, cadences and the certificate's constants.

    Notes
    -----
    Pure and deterministic: equal states and measurements give equal decisions, bit for bit on one build of numpy.
    Cost at k = 64: 33 us a step alone (``python -m benchmarks cost``), more in a loop that evicts it from the caches.

    Examples
    --------
    >>> from kalmanguard.records import Measurement
    >>> engine = Engine(Settings())
    >>> state, decision = engine.step(engine.init(), Measurement(step=1, loss=2.3, learning_rates=(0.1,)))
    >>> decision.action, decision.level
    (<Action.ACCEPT: 'ACCEPT'>, <Level.WARMUP: 'WARMUP'>)
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._bank = EstimatorBank()
        self._watch = Watch(settings)
        self._judge = Judge(settings)
        self._policy = Policy(settings, self._judge)

    def init(self, *, began: int = 0) -> EngineState:
        """The state before the first measurement, that of step ``began + 1``."""
        return EngineState(ledger=Ledger(began=began))

    def step(self, state: EngineState, measurement: Measurement) -> tuple[EngineState, Decision]:
        """Fold in one complete measurement, with its probe if one was taken."""
        return self.decide(self.observe(state, measurement), measurement.probe)

    def observe(self, state: EngineState, m: Measurement) -> Foresight:
        """Run the estimators and the cheap detectors, and say whether this step wants a probe."""
        state = self._arrivals(state, m)
        if is_restore(m):
            return Foresight(self._rewound(state, m), m)
        estimators, ledger, saved = state
        if ledger.proposed:
            # The proposal of the step before was not carried out (observe mode): do not repeat it at every probe.
            ledger = ledger._replace(proposed=False, declined=True)
        largest = estimators.largest_gradient
        estimators, innovations = self._bank.step(estimators, m)
        ledger, evidence, drift = self._watch.look(ledger, innovations, m, largest_gradient=largest)
        adopt = m.braced and ledger.episode is not None and ledger.episode.onset == m.step
        adopt = adopt and len(ledger.slots) <= ledger.capacity and all(s.step != m.step - 1 for s in ledger.slots)
        if adopt:
            # The state from right before the first step of a suspicion is what a rollback would want.
            ledger = ledger._replace(slots=(*ledger.slots, Slot(m.step - 1, False, math.inf)))
            saved = (*saved, (m.step - 1, state.estimators))
        wants = self._watch.wants_probe(ledger, m.step)
        return Foresight(EngineState(estimators, ledger, saved), m, evidence, innovations, drift, wants, adopt)

    def decide(self, foresight: Foresight, probe: ProbeReading | None) -> tuple[EngineState, Decision]:
        """Judge a step, with its probe if one was taken, and say what to do."""
        (estimators, ledger, saved), m, evidence, innovations, drift, _, adopt = foresight
        ledger = _count_skips(ledger, m)
        verdict = Verdict()
        if probe is not None and ledger.mode is not Mode.HALTED:
            estimators, ledger, verdict = self._judge.judge(estimators, ledger, m, probe)
            evidence = (*evidence, *verdict.evidence)
            ledger = ledger._replace(episode=None) if is_restore(m) else self._judge.follow_up(ledger, m, verdict)
        if m.step > 0 and not ledger.warm:
            ledger = self._judge.end_warmup(ledger, m)
        harm = self._policy.harm(ledger, m, verdict, evidence)
        statistics = _statistics(estimators, innovations, drift, verdict)
        ruling = None
        if ledger.mode is Mode.HALTED:
            decision = _halted(ledger, m, evidence, statistics)
        else:
            # What was once declined is not proposed again, but a run that cannot move must not go on like that.
            if harm and (not ledger.declined or self._policy.is_stuck(ledger, m)):
                # What a probe has not shown is not weighed against probes either.
                y = verdict.y if verdict.harm else math.nan
                bound = verdict.bound if verdict.envelope is not None else math.inf
                ruling = self._policy.intervene(ledger, m, harm, y, bound, evidence, statistics)
            if ruling is None:
                ruling = self._policy.accept(ledger, m, verdict, evidence, statistics, estimators=estimators)
            ledger, decision = ruling
            if adopt:
                decision = replace(decision, orders=replace(decision.orders, adopt=True))
        if decision.orders.snapshot:
            saved = (*(pair for pair in saved if pair[0] != m.step), (m.step, estimators))
        if decision.orders.evict or decision.orders.snapshot:
            held = {slot.step for slot in ledger.slots}
            saved = tuple(pair for pair in saved if pair[0] in held)
        return EngineState(estimators, ledger, saved), decision

    def _arrivals(self, state: EngineState, m: Measurement) -> EngineState:
        """Costs, objectives and failures of the actuators, which change what the following steps are judged by."""
        estimators, ledger, saved = state
        if m.costs is not None:
            ledger = ledger._replace(cadence=cadence(self.settings, m.costs), capacity=max(2, m.costs.slots))
        lost = -1
        if m.snapshot_failed:
            lost = ledger.last_snapshot
        if m.outcome is not None and m.outcome.restored_step is None and m.outcome.error is not None:
            # The state could not be restored: it is not counted on any more, and the harm is met again.
            lost, ledger = ledger.target, ledger._replace(proposed=False)
        if lost >= 0:
            ledger = ledger._replace(slots=tuple(s for s in ledger.slots if s.step != lost))
            saved = tuple(pair for pair in saved if pair[0] != lost)
        if m.objective != ledger.objective:
            ledger = restarted(ledger, m.objective, m.step - 1)
            estimators = estimators._replace(
                probe=ProbeState(), loss=TrendState(), gradient=TrendState(), largest_gradient=0.0, reference=None
            )
            saved = ()
        return EngineState(estimators, ledger, saved)

    def _rewound(self, state: EngineState, m: Measurement) -> EngineState:
        """Rewind the estimators to a slot that the actuators have restored; the ledger goes on."""
        assert m.outcome is not None
        ledger = self._policy.restored(state.ledger, m)
        estimators = next((e for step, e in state.saved if step == m.outcome.restored_step), state.estimators)
        held = {slot.step for slot in ledger.slots}
        return EngineState(estimators, ledger, tuple(pair for pair in state.saved if pair[0] in held))


def _count_skips(ledger: Ledger, m: Measurement) -> Ledger:
    skipped = ledger.skipped_in_a_row + 1 if m.veto else 0
    # User code that edits parameters itself does so again and again; a flipped bit does not.
    tampered = ledger.tampered + bool(m.tampered and edits(m))
    if skipped == ledger.skipped_in_a_row and tampered == ledger.tampered:
        return ledger
    return ledger._replace(skipped_in_a_row=skipped, tampered=tampered)


def _halted(ledger: Ledger, m: Measurement, evidence: tuple[Evidence, ...], statistics: tuple[float, ...]) -> Decision:
    return Decision(
        m.step, Action.HALT, Action.HALT, Level.CONFIRMED, Mode.HALTED,
        "The run is halted: the recovery ladder is exhausted and the best certified state is restored.",
        evidence, certificate=status(ledger), statistics=statistics,
    )  # fmt: skip


_NO_PROBE = (math.nan,) * 10
_NO_BET = (math.nan, math.nan, 0.0, 0.0)


def _statistics(
    estimators: Estimators, innovations: Innovations, drift: DriftResult | None, verdict: Verdict
) -> tuple[float, ...]:
    probe = _NO_PROBE
    if verdict.envelope is not None:
        p, v = verdict.prediction, verdict.envelope
        probe = (
            verdict.y, p.level if p else math.nan, p.deviation if p and p.ready else math.nan, verdict.level,
            v.start, v.best, v.bound, v.allowance, v.standard_error, float(verdict.accepted),
        )  # fmt: skip
    bet = _NO_BET if drift is None else (drift.x, drift.statistic, float(drift.alarm), float(drift.reset))
    level = estimators.loss.level
    return (
        *probe, *bet, *map(_z, innovations.channels), innovations.nis, innovations.rank, innovations.speed,
        math.nan if level is None else level,
    )  # fmt: skip


def _z(innovation: Innovation | None) -> float:
    return math.nan if innovation is None else innovation.normalised
