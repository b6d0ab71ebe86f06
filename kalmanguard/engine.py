"""The pure fold: ``step(state, measurement) -> (state, decision)``, the same for live runs, replay and what-if.

No torch, no clock, no files: everything that it may know arrives in the `Measurement`. The state has two halves:
`Estimators` are rewound with a rollback, one copy per ring slot; the `Ledger` never is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from kalmanguard.control.cadence import Cadence, cadence
from kalmanguard.control.envelope import Envelope, EnvelopeRule
from kalmanguard.control.ladder import Ladder, LadderState
from kalmanguard.control.retention import Slot, to_evict
from kalmanguard.detectors.drift import DriftResult, DriftState, DriftTest
from kalmanguard.detectors.excursion import RATIO, ExcursionState, LearningRateExcursion
from kalmanguard.detectors.paired import paired_standard_error, paired_test
from kalmanguard.detectors.tail import TailState, TailTest
from kalmanguard.estimators.probe import ProbeFilter, ProbePrediction, ProbeState
from kalmanguard.estimators.trajectory import TrajectoryFilter, TrajectoryState
from kalmanguard.estimators.trend import TrendFilter, TrendState
from kalmanguard.records import (
    OVERWRITE,
    Action,
    Decision,
    Evidence,
    FloatArray,
    Guarantee,
    Innovation,
    Level,
    Measurement,
    Mode,
    Orders,
    ProbeReading,
)
from kalmanguard.settings import Settings

#: Names of `Decision.statistics`, in order; the journal's header repeats them.
STATISTICS = (
    "y", "predicted", "scale", "level", "y0", "y_best", "bound", "allowance", "allowance_se", "accepted",
    "drift_x", "drift_m", "drift_alarm", "drift_reset",
    "z_loss", "z_gradient", "z_gain", "z_buffers", "z_trajectory", "nis", "rank", "speed", "loss_level",
)  # fmt: skip

_CHANNELS = ("loss", "gradient", "gain", "buffers", "trajectory")
_TAIL_RATE = 1.5e-4
_GATE_DECAY = 0.999
#: Steps after the last suspicion during which nothing is certified.
_QUIET = 5
#: A learning rate above this many times its moving average has just been raised: a loss that rises is no drift then.
_RAISED = 1.5
_RATE_GAIN = 0.01
#: Steps that a drift takes to lift the statistic out of what healthy training gives.
_DRIFT_START = 8
#: Shares of the give-back that count as harm when a drift alarm, or an innovation that lasts, stands behind it.
_DRIFTED_SHARE = 0.25
_EXPLAINED_SHARE = 0.5
#: The same for a run that has just been restored, and the steps between its probes.
_RECOVERING_SHARE = 0.125
_RECOVERING_PROBES = 8
#: Times ``hold`` after which a restored run that has not come back counts as harmed again.
_PATIENT_HOLDS = 3
#: Probes in a row, each above the one before, after which it counts so at once.
_CLIMBS = 6
#: Steps between probes while a learning rate is beyond what has been certified.
_EXCURSION_PROBES = 4
#: Edits of parameters between steps after which they count as the user's habit.
_HABIT = 3
#: Innovation of the probe, in tracked standard deviations, above which a state is not certified.
_PROBE_GATE = 6.0


class Estimators(NamedTuple):
    """What a rollback rewinds."""

    trajectory: TrajectoryState = TrajectoryState()
    probe: ProbeState = ProbeState()
    loss: TrendState = TrendState()
    gradient: TrendState = TrendState()
    gain: TrendState = TrendState()
    buffers: TrendState = TrendState()
    largest_gradient: float = 0.0
    reference: FloatArray | None = None


class Episode(NamedTuple):
    """One stretch of suspicion: when it began, whether an innovation explains it, what its probes said, when to look.

    ``drifted``: the drift test has alarmed, and no rise of the learning rate accounts for it. ``first``, ``worst`` and ``excess`` are how far above the best level the first, the worst and the last of
    ``broken`` probes outside the envelope lay; ``rising`` counts probes in a row that were each above the one before.
    ``tails`` are the thresholds from before the episode: an alarm that proves right does not raise them.
    """

    onset: int
    last: int
    explained: bool
    drifted: bool = False
    broken: int = 0
    first: float = math.inf
    worst: float = 0.0
    excess: float = math.inf
    rising: int = 0
    y: float = math.inf
    next_probe: int = 0
    gap: int = 1
    tails: tuple[TailState, ...] | None = None


class Ledger(NamedTuple):
    """What no rollback rewinds."""

    mode: Mode = Mode.WATCHING
    warm: bool = False
    cadence: Cadence | None = None
    capacity: int = 2
    objective: int = 0
    start: float = math.nan
    best: float = math.inf
    standard_error: float = 0.0
    probes: int = 0
    last_probe: int = -1
    last_accepted: int = -1
    last_snapshot: int = -1
    episode: Episode | None = None
    declined: bool = False
    proposed: bool = False
    slots: tuple[Slot, ...] = ()
    tails: tuple[TailState, ...] = (TailState(),) * len(_CHANNELS)
    drift: DriftState = DriftState()
    excursion: ExcursionState = ExcursionState()
    lowest_loss: float = math.inf
    rate: float = 0.0
    ladder: LadderState = LadderState()
    skipped_in_a_row: int = 0
    tampered: int = 0
    lapsed: int = 0
    last_y: float = math.inf
    climbed: int = 0


class EngineState(NamedTuple):
    """The fold's whole state; ``saved`` holds one copy of the estimators per ring slot."""

    estimators: Estimators = Estimators()
    ledger: Ledger = Ledger()
    saved: tuple[tuple[int, Estimators], ...] = ()


class Foresight(NamedTuple):
    """What is known of a step before its probe; ``wants_probe`` says whether one should be taken."""

    state: EngineState
    measurement: Measurement
    evidence: tuple[Evidence, ...]
    innovations: tuple[float, ...]
    drift: DriftResult | None
    wants_probe: bool


class Engine:
    """Estimators, detectors and policy, composed.

    Parameters
    ----------
    settings
        Thresholds, cadences and the certificate's constants.

    Notes
    -----
    Pure and deterministic: equal states and measurements give equal decisions, bit for bit on one build of numpy.
    Cost: about 40 us a step at k = 64, and 150 us more with a probe of 128 examples.

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
        self._trajectory = TrajectoryFilter()
        self._probe = ProbeFilter()
        self._loss = TrendFilter("loss", floor_frac=1e-3)
        self._gradient = TrendFilter("gradient", floor=0.05)
        self._gain = TrendFilter("gain", floor=0.05)
        self._buffers = TrendFilter("buffers", floor=0.02)
        self._tails = tuple(
            TailTest(channel, threshold=settings.suspicion, rate=_TAIL_RATE, two_sided=channel in ("gain", "buffers"))
            for channel in _CHANNELS
        )
        self._drift = DriftTest(run_length=settings.run_length)
        self._excursion = LearningRateExcursion()
        self._rule = EnvelopeRule(
            give_back=settings.give_back,
            standard_errors=settings.standard_errors,
            floor_frac=settings.floor_frac,
        )
        self._ladder = Ladder(budget=settings.rollback_budget, recovery_steps=settings.recovery_steps)

    def init(self) -> EngineState:
        """The state before the first measurement."""
        return EngineState()

    def step(self, state: EngineState, measurement: Measurement) -> tuple[EngineState, Decision]:
        """Fold in one complete measurement, with its probe if one was taken."""
        return self.decide(self.observe(state, measurement), measurement.probe)

    # -- before the probe ----------------------------------------------------------------------------------------

    def observe(self, state: EngineState, m: Measurement) -> Foresight:
        """Run the estimators and the cheap detectors, and say whether this step wants a probe."""
        estimators, ledger, saved = state
        if m.costs is not None:
            ledger = ledger._replace(cadence=cadence(self.settings, m.costs), capacity=max(2, m.costs.slots))
        if m.objective != ledger.objective:
            ledger = _restart(ledger, m.objective)
            estimators = estimators._replace(probe=ProbeState(), loss=TrendState(), reference=None)
            saved = ()
        if m.outcome is not None and m.outcome.restored_step is not None:
            state = self._restored(EngineState(estimators, ledger, saved), m)
            return Foresight(state, m, (), (math.nan,) * 9, None, m.probe is not None)
        if ledger.proposed:
            # The proposal of the step before was not carried out (observe mode): do not repeat it at every probe.
            ledger = ledger._replace(proposed=False, declined=True)
        innovations, estimators, speed = self._estimate(estimators, m)
        tails = ledger.tails
        evidence, ledger, drift = self._detect(ledger, estimators, innovations[0], m)
        episode = ledger.episode
        if evidence:
            episode = (
                Episode(m.step, m.step, explained=True, next_probe=m.step, tails=tails)
                if episode is None
                else episode._replace(last=m.step, explained=True, next_probe=m.step, gap=1)
            )
            if drift is not None and drift.alarm and max(m.learning_rates, default=0.0) <= _RAISED * ledger.rate:
                # The alarm comes long after the drift began: go back to before that.
                began = m.step - ledger.drift.risen_for - _DRIFT_START
                episode = episode._replace(drifted=True, onset=min(episode.onset, began))
            ledger = ledger._replace(episode=episode)
        wants = (
            m.step - ledger.last_probe >= self._probe_every(ledger, m.step)
            or ledger.probes == 0
            or (episode is not None and m.step >= episode.next_probe)
            or (ledger.excursion.fired_at > 1.0 and m.step - ledger.last_probe >= _EXCURSION_PROBES)
            or (
                ledger.mode is Mode.RECOVERING
                and (
                    _looks_again(m.step - ledger.ladder.restored_at)
                    or m.step - ledger.last_probe >= _RECOVERING_PROBES
                )
            )
        )
        z, trajectory = innovations
        values = (*z, *trajectory, speed)
        return Foresight(
            EngineState(estimators, ledger, saved), m, evidence, values, drift, wants and ledger.mode is not Mode.HALTED
        )

    def _estimate(
        self, e: Estimators, m: Measurement
    ) -> tuple[tuple[tuple[Innovation | None, ...], tuple[float, float]], Estimators, float]:
        loss = gradient = gain = buffers = moved = None
        loss_state, gradient_state, gain_state, buffer_state = e.loss, e.gradient, e.gain, e.buffers
        largest = e.largest_gradient
        if m.loss is not None and math.isfinite(m.loss):
            loss_state, loss = self._loss.step(loss_state, m.loss)
        norm = m.gradient_norm
        if norm is not None and 0.0 < norm < math.inf:
            gradient_state, gradient = self._gradient.step(gradient_state, math.log(norm))
            if m.veto is None:
                largest = max(norm, largest * _GATE_DECAY)
            elif m.veto == "clipped":
                largest = max(largest, self.settings.gate_ratio * largest)
        if m.buffer_norm is not None and 0.0 < m.buffer_norm < math.inf:
            buffer_state, buffers = self._buffers.step(buffer_state, math.log(m.buffer_norm))
        trajectory_state, nis, rank, speed = e.trajectory, math.nan, math.nan, 0.0
        rate = max(m.learning_rates, default=0.0) * m.lr_factor
        if m.velocity is not None and m.parameters_finite and m.veto in (None, "clipped"):
            length = math.sqrt(float(m.velocity.dot(m.velocity)))
            # Below the rounding floor the velocity is arithmetic noise of the parameters' dtype: abstain.
            if length > m.rounding_floor and rate > 0:
                gain_state, gain = self._gain.step(gain_state, math.log(length / rate))
                trajectory_state, innovation = self._trajectory.step(trajectory_state, m.velocity, rate)
                if innovation is not None:
                    nis, rank, speed = innovation.nis, innovation.rank, innovation.speed
                    moved = Innovation("trajectory", innovation.normalised, 1.0)
        probe = self._probe.travel(e.probe, speed)
        return (
            ((loss, gradient, gain, buffers, moved), (nis, rank)),
            Estimators(
                trajectory_state, probe, loss_state, gradient_state, gain_state, buffer_state, largest, e.reference
            ),
            speed,
        )

    def _detect(
        self, ledger: Ledger, e: Estimators, innovations: tuple[Innovation | None, ...], m: Measurement
    ) -> tuple[tuple[Evidence, ...], Ledger, DriftResult | None]:
        found: list[Evidence] = []
        warm = ledger.warm or m.step > self.settings.warmup_steps
        tails = ledger.tails
        drift, drift_state, lowest = None, ledger.drift, ledger.lowest_loss
        excursion = ledger.excursion
        now = max(m.learning_rates, default=0.0)
        rate = now if ledger.rate == 0.0 else ledger.rate + _RATE_GAIN * (now - ledger.rate)
        if warm:
            if any(i is not None for i in innovations):
                new = list(tails)
                for index, innovation in enumerate(innovations):
                    if innovation is not None:
                        tail, evidence = self._tails[index].step(tails[index], innovation)
                        # One episode counts once: a shift that lasts must not raise the threshold at every step.
                        if evidence is None or ledger.episode is None:
                            new[index] = tail
                        if evidence is not None:
                            found.append(evidence)
                tails = tuple(new)
            excursion, evidence = self._excursion.step(excursion, _effective(m))
            if evidence is not None:
                found.append(evidence)
        else:
            excursion = self._excursion.learn(excursion, _effective(m))
        if m.loss is not None and math.isfinite(m.loss):
            drift_state, drift, evidence = self._drift.step(drift_state, m.loss)
            if evidence is not None:
                found.append(evidence)
            if drift_state.level is not None and warm:
                lowest = min(lowest, drift_state.level)
        found.extend(_certain(m, habitual=ledger.tampered > _HABIT))
        return (
            tuple(found),
            ledger._replace(tails=tails, drift=drift_state, excursion=excursion, lowest_loss=lowest, rate=rate),
            drift,
        )

    def _restored(self, state: EngineState, m: Measurement) -> EngineState:
        """Rewind the estimators to a slot that the actuators have restored; the ledger goes on."""
        assert m.outcome is not None
        target = m.outcome.restored_step
        estimators, ledger, saved = state
        estimators = next((e for step, e in saved if step == target), estimators)
        # Newer states that a probe has certified stay: the best of them is where a halt would go back to.
        slots = tuple(s for s in ledger.slots if s.certified or s.step <= (target or 0))
        held = {s.step for s in slots}
        level = next((s.level for s in slots if s.step == target), ledger.best)
        halted = m.outcome.action is Action.HALT
        ladder, episode = ledger.ladder, ledger.episode
        if not m.outcome.manual and not halted:
            ladder = self._ladder.climb(ladder, m.step, level)
        ledger = ledger._replace(
            tails=episode.tails if episode is not None and episode.tails is not None else ledger.tails,
            mode=Mode.HALTED if halted else Mode.WATCHING if m.outcome.manual else Mode.RECOVERING,
            episode=None,
            proposed=False,
            declined=False,
            slots=slots,
            ladder=ladder,
            skipped_in_a_row=0,
            climbed=0,
            last_snapshot=m.step,
            last_probe=m.step,
        )
        return EngineState(estimators, ledger, tuple((s, e) for s, e in saved if s in held))

    # -- with the probe ------------------------------------------------------------------------------------------

    def decide(self, foresight: Foresight, probe: ProbeReading | None) -> tuple[EngineState, Decision]:
        """Judge a step, with its probe if one was taken, and say what to do."""
        (estimators, ledger, saved), m, evidence, values, drift, _ = foresight
        verdict = _Verdict()
        ledger = self._count_skips(ledger, m)
        if probe is not None and ledger.mode is not Mode.HALTED:
            estimators, ledger, verdict = self._judge(estimators, ledger, m, probe)
            evidence = (*evidence, *verdict.evidence)
        if m.outcome is not None and m.outcome.restored_step is not None:
            ledger, harm = self._verify_restore(ledger, m, probe, verdict)
        else:
            jumped = any(item.detector in ("gain", "trajectory") for item in evidence)
            harm = verdict.harm or self._harm_without_probe(ledger, m, jumped=jumped)
        ledger = self._follow_up(ledger, m, probe, verdict)
        if m.step > 0 and not ledger.warm:
            ledger = self._end_warmup(ledger, m)
        state = EngineState(estimators, ledger, saved)
        statistics = self._statistics(state, values, drift, verdict)
        if ledger.mode is Mode.HALTED:
            decision = Decision(
                m.step, Action.HALT, Action.HALT, Level.CONFIRMED, Mode.HALTED,
                "The run is halted: the recovery ladder is exhausted and the best certified state is restored.",
                evidence, certificate=self._status(ledger), statistics=statistics,
            )  # fmt: skip
            return state, decision
        if harm and not ledger.declined:
            intervention = self._intervene(state, m, harm, verdict.y, evidence, statistics)
            if intervention is not None:
                return intervention
        return self._accept(state, m, probe, verdict, evidence, statistics)

    def _judge(
        self, e: Estimators, ledger: Ledger, m: Measurement, probe: ProbeReading
    ) -> tuple[Estimators, Ledger, _Verdict]:
        y = probe.mean
        ledger = ledger._replace(probes=ledger.probes + 1, last_probe=m.step)
        if not math.isfinite(y):
            bad = Evidence("probe", y, True, Guarantee.EXACT, "the held-out loss is not finite", e_value=None)
            return e, ledger, _Verdict(y=y, harm="the held-out loss is not finite", evidence=(bad,))
        if math.isnan(ledger.start):
            ledger = ledger._replace(start=y, best=y, last_accepted=m.step)
            e = e._replace(probe=self._probe.update(e.probe, y, 0.0), reference=probe.losses)
            return e, ledger, _Verdict(y=y, level=y, accepted=True, envelope=self._rule.of(y, y, 0.0))
        envelope = self._rule.of(ledger.start, ledger.best, ledger.standard_error)
        floor = max(ledger.standard_error, 1e-4 * abs(ledger.best), 1e-12)
        prediction = self._probe.predict(e.probe, floor)
        evidence: tuple[Evidence, ...] = ()
        if e.reference is not None and len(e.reference) == len(probe.losses):
            evidence = (paired_test(probe.losses, e.reference),)
        bound = envelope.bound
        if ledger.mode is Mode.RECOVERING and ledger.warm:
            # A restored run must show that it no longer degrades, so it is held closer.
            line = self._rule.of(ledger.start, ledger.best, ledger.standard_error, share=_RECOVERING_SHARE)
            bound = min(bound, max(ledger.ladder.level, ledger.best) + line.allowance)
        gated = ledger.warm and prediction is not None and prediction.ready and (
            y > prediction.level + _PROBE_GATE * prediction.deviation
        )
        broken = ledger.warm and y > bound
        accepted = not broken and not gated
        strained = broken
        if ledger.warm and ledger.episode is not None and ledger.episode.explained:
            share = _DRIFTED_SHARE if ledger.episode.drifted else _EXPLAINED_SHARE
            strained |= y > self._rule.of(ledger.start, ledger.best, ledger.standard_error, share=share).bound
        if broken:
            evidence = (
                *evidence,
                Evidence(
                    "envelope", envelope.give_back(y), True, Guarantee.EXACT,
                    f"held-out loss {y:.4g} is above its bound {bound:.4g}: {100 * envelope.give_back(y):.0f} % of the "
                    f"progress from {envelope.start:.4g} to {envelope.best:.4g} is given back",
                ),
            )  # fmt: skip
        elif gated and prediction is not None:
            evidence = (
                *evidence,
                Evidence(
                    "probe-innovation", (y - prediction.level) / prediction.deviation, True, Guarantee.HEURISTIC,
                    f"held-out loss {y:.4g} was predicted to be {prediction.level:.4g} +- {prediction.deviation:.2g}",
                ),
            )  # fmt: skip
        verdict = _Verdict(
            y=y, level=math.nan, accepted=accepted, broken=broken, gated=gated, bound=bound, envelope=envelope,
            strained=strained, prediction=prediction, evidence=evidence,
        )  # fmt: skip
        if strained:
            ledger, verdict = self._weigh(ledger, m, verdict)
        if ledger.mode is Mode.RECOVERING and not self._is_back(ledger, y):
            ledger = ledger._replace(climbed=ledger.climbed + 1 if y > ledger.last_y else 0)
            overdue = m.step - ledger.ladder.restored_at >= _PATIENT_HOLDS * ledger.ladder.hold
            if overdue or ledger.climbed >= _CLIMBS:
                verdict = verdict._replace(
                    harm=f"the held-out loss {y:.4g} moves away from the restored {ledger.ladder.level:.4g}, "
                    f"{m.step - ledger.ladder.restored_at} steps after the last rollback"
                )
        ledger = ledger._replace(last_y=y)
        if not broken:
            e = e._replace(probe=self._probe.update(e.probe, y, floor))
        if accepted:
            assert e.probe.gaussian is not None
            level = e.probe.gaussian.level
            if e.reference is not None and len(e.reference) == len(probe.losses):
                error = paired_standard_error(probe.losses, e.reference)
                seen = ledger.standard_error
                ledger = ledger._replace(standard_error=error if seen == 0 else seen + 0.2 * (error - seen))
            # The filtered level, not the luckiest probe; never below what the probe itself has shown.
            best = min(ledger.best, max(level, y))
            ledger = ledger._replace(best=best, last_accepted=m.step, declined=False)
            e = e._replace(reference=probe.losses)
            verdict = verdict._replace(level=max(level, y))
        return e, ledger, verdict

    def _weigh(self, ledger: Ledger, m: Measurement, verdict: _Verdict) -> tuple[Ledger, _Verdict]:
        """A broken envelope: harm to be undone, a spike that heals by itself, or overfitting?

        Severe harm that an innovation explains is undone at once. Moderate harm is given time: it is confirmed when it
        grows, or when it has not fallen by a third over probes at doubling distances. Without any innovation to explain
        it, it is given four times as long, since healthy training has such spikes and recovers from them. With one, half
        of the bound counts as harm if it lasts, and a quarter when the training loss has drifted as well.
        """
        assert verdict.envelope is not None
        episode = ledger.episode or Episode(max(ledger.last_accepted + 1, 1), m.step, explained=False)
        excess = verdict.y - verdict.envelope.best
        previous = episode.excess
        episode = episode._replace(
            broken=episode.broken + 1,
            first=excess if episode.broken == 0 else episode.first,
            worst=max(episode.worst, excess),
            excess=excess,
        )
        ledger = ledger._replace(episode=episode)
        give_back = verdict.envelope.give_back(verdict.y)
        if not episode.explained and self._overfits(ledger, m, verdict):
            advice = Evidence(
                "overfitting", give_back, True, Guarantee.HEURISTIC,
                "held-out loss rises slowly while the training loss is at its lowest: overfitting, not instability; "
                "consider stopping early",
            )  # fmt: skip
            return ledger._replace(episode=None, lapsed=ledger.lapsed + 1), verdict._replace(
                overfitting=True, evidence=(*verdict.evidence, advice)
            )
        patience = self.settings.patience
        if give_back > max(0.5, 2.5 * self.settings.give_back):
            confirmed = episode.explained or (episode.broken >= 2 and excess > 0.8 * previous)
        elif not verdict.broken:
            last = 2 if episode.drifted else patience + 2
            confirmed = episode.broken >= last and excess > 0.67 * episode.worst
        elif ledger.mode is Mode.RECOVERING:
            confirmed = episode.broken >= patience + 2 or episode.rising + (verdict.y > episode.y) > patience
        else:
            climbing = episode.rising + (verdict.y > episode.y) >= patience
            growing = episode.explained and (climbing or (episode.broken >= patience and excess > 1.15 * episode.first))
            last = patience + (2 if episode.explained else 4)
            confirmed = growing or (episode.broken >= last and excess > 0.67 * episode.worst)
        if not confirmed:
            return ledger, verdict
        harm = (
            f"the held-out loss {verdict.y:.4g} has left its best level {verdict.envelope.best:.4g} (bound "
            f"{verdict.bound:.4g}) and {100 * min(give_back, 99.99):.0f} % of the progress is lost"
        )
        return ledger, verdict._replace(harm=harm)

    def _is_back(self, ledger: Ledger, y: float) -> bool:
        """Whether a restored run is where it was restored to, or better, within the probe's noise."""
        line = self._rule.of(ledger.ladder.level, ledger.ladder.level, ledger.standard_error)
        return not ledger.warm or y <= line.bound

    def _overfits(self, ledger: Ledger, m: Measurement, verdict: _Verdict) -> bool:
        state = ledger.drift
        if m.loss is None or state.level is None or verdict.prediction is None or not verdict.prediction.ready:
            return False
        lowest = state.level <= ledger.lowest_loss + 0.5 * state.scale.deviation
        slow = verdict.y <= verdict.prediction.level + _PROBE_GATE * verdict.prediction.deviation
        return lowest and slow

    def _harm_without_probe(self, ledger: Ledger, m: Measurement, *, jumped: bool) -> str:
        if not m.parameters_finite:
            return "a parameter is not finite"
        if ledger.warm and jumped and OVERWRITE in m.tampered:
            return "one step has changed the parameters by as much as their whole norm"
        edits = _edits(m)
        if edits and all(t.startswith("silent") for t in edits) and ledger.tampered <= 1 and ledger.warm:
            return f"{' and '.join(t.removeprefix('silent ') for t in edits)} changed without an optimizer step"
        if ledger.skipped_in_a_row and ledger.skipped_in_a_row % 8 == 0 and m.veto == "nonfinite":
            return f"{ledger.skipped_in_a_row} proposed steps in a row were not finite"
        return ""

    @staticmethod
    def _verify_restore(
        ledger: Ledger, m: Measurement, probe: ProbeReading | None, verdict: _Verdict
    ) -> tuple[Ledger, str]:
        """An uncertified state is certified now, after it was restored, or an older one is tried."""
        assert m.outcome is not None
        ledger = ledger._replace(episode=None)
        if probe is None or m.outcome.manual or m.outcome.action is Action.HALT:
            return ledger, ""
        if not verdict.accepted:
            return ledger, f"the restored state of step {m.outcome.restored_step} is outside the envelope itself"
        return ledger._replace(ladder=ledger.ladder._replace(level=verdict.level)), ""

    def _count_skips(self, ledger: Ledger, m: Measurement) -> Ledger:
        skipped = ledger.skipped_in_a_row + 1 if m.veto else 0
        # User code that edits parameters itself does so again and again; a flipped bit does not.
        tampered = ledger.tampered + bool(_edits(m))
        if skipped == ledger.skipped_in_a_row and tampered == ledger.tampered:
            return ledger
        return ledger._replace(skipped_in_a_row=skipped, tampered=tampered)

    def _follow_up(self, ledger: Ledger, m: Measurement, probe: ProbeReading | None, verdict: _Verdict) -> Ledger:
        """Decide when an episode is looked at again, and when it is over."""
        episode = ledger.episode
        if probe is None or verdict.overfitting:
            return ledger
        if verdict.accepted and not verdict.strained:
            if episode is None:
                return ledger
            if m.step - episode.last >= _QUIET and ledger.excursion.fired_at == 1.0:
                return ledger._replace(episode=None)
            episode = episode._replace(broken=0, worst=0.0, excess=math.inf)
        elif episode is None:
            episode = Episode(max(ledger.last_accepted + 1, 1), m.step, explained=False)
        else:
            episode = episode._replace(last=m.step)
        # Looked at in the next step, then at doubling distances unless it climbs: each look costs a probe.
        rising = episode.rising + 1 if verdict.y > episode.y else 0
        gap = episode.gap if rising else 2 * episode.gap
        return ledger._replace(
            episode=episode._replace(next_probe=m.step + episode.gap, gap=gap, rising=rising, y=verdict.y)
        )

    def _end_warmup(self, ledger: Ledger, m: Measurement) -> Ledger:
        settings = self.settings
        if m.step < settings.warmup_steps or ledger.probes < 3 or math.isnan(ledger.start):
            return ledger
        floor = self._rule.of(ledger.best, ledger.best, ledger.standard_error).allowance
        progressed = ledger.start - ledger.best > 2.0 * floor
        if progressed or m.step >= 10 * settings.warmup_steps:
            return ledger._replace(warm=True)
        return ledger

    # -- what to do ----------------------------------------------------------------------------------------------

    def _accept(
        self,
        state: EngineState,
        m: Measurement,
        probe: ProbeReading | None,
        verdict: _Verdict,
        evidence: tuple[Evidence, ...],
        statistics: tuple[float, ...],
    ) -> tuple[EngineState, Decision]:
        estimators, ledger, saved = state
        release = False
        certify: tuple[int, ...] = ()
        verified = m.outcome is not None and m.outcome.restored_step is not None
        if verified and probe is not None and verdict.accepted:
            certify = (m.outcome.restored_step or 0,) if m.outcome is not None else ()
            ledger = ledger._replace(
                slots=tuple(
                    s._replace(certified=True, level=verdict.level) if s.step in certify else s for s in ledger.slots
                )
            )
        if (
            ledger.mode is Mode.RECOVERING
            and verdict.accepted
            and self._ladder.recovered(ledger.ladder, m.step)
            and self._is_back(ledger, verdict.y)
            and self._excursion.ratio(ledger.excursion, m.learning_rates) <= RATIO
        ):
            ledger = ledger._replace(mode=Mode.WATCHING)
            release = True
        if ledger.mode is Mode.WATCHING and ledger.ladder.score and ledger.episode is None:
            ledger = ledger._replace(ladder=self._ladder.settle(ledger.ladder, m.step))
        state = EngineState(estimators, ledger, saved)
        snapshot, evict = False, ()
        if not verified:
            state, snapshot, evict = self._schedule_snapshot(state, m, verdict)
            ledger = state.ledger
        vetoed = m.veto in ("nonfinite", "explosion")
        fired = any(item.fired for item in evidence)
        if vetoed:
            level = Level.CONFIRMED
        elif not ledger.warm:
            level = Level.SUSPECT if fired and _certain(m) else Level.WARMUP
        else:
            level = Level.SUSPECT if fired or (probe is not None and not verdict.accepted) else Level.NOMINAL
        gate = math.inf
        if ledger.warm and estimators.largest_gradient > 0:
            gate = self.settings.gate_ratio * estimators.largest_gradient
        action = Action.VETO if vetoed else Action.ACCEPT
        orders = Orders(
            snapshot=snapshot, certified=snapshot and verdict.accepted, certify=certify, evict=evict, gate=gate,
            clip=ledger.skipped_in_a_row >= self.settings.gate_skips, release=release,
        )  # fmt: skip
        decision = Decision(
            m.step, action, action, level, ledger.mode, _reason(m, level, verdict, evidence), evidence,
            certificate=self._status(ledger), orders=orders, statistics=statistics,
        )  # fmt: skip
        return state, decision

    def _schedule_snapshot(
        self, state: EngineState, m: Measurement, verdict: _Verdict
    ) -> tuple[EngineState, bool, tuple[int, ...]]:
        estimators, ledger, saved = state
        episode = ledger.episode
        if episode is not None and m.step > 0:
            return state, False, ()
        certified = verdict.accepted
        every = self._cadence(ledger).snapshot_every
        # A probed state is worth more than the candidates since the last one, whatever their cadence.
        newest = max((s.step for s in ledger.slots if s.certified), default=-every)
        due = m.step - (newest if certified else ledger.last_snapshot) >= every or not ledger.slots
        if not due or m.veto or not m.parameters_finite:
            return state, False, ()
        if not certified and verdict.prediction is not None:
            return state, False, ()
        evict = to_evict(ledger.slots, m.step, ledger.capacity, certified=certified)
        level = verdict.level if certified else math.inf
        slots = (*(s for s in ledger.slots if s.step not in evict), Slot(m.step, certified, level))
        kept = tuple((step, e) for step, e in saved if step not in evict and step != m.step)
        return (
            EngineState(
                estimators, ledger._replace(slots=slots, last_snapshot=m.step), (*kept, (m.step, estimators))
            ),
            True,
            evict,
        )

    def _intervene(
        self,
        state: EngineState,
        m: Measurement,
        harm: str,
        y: float,
        evidence: tuple[Evidence, ...],
        statistics: tuple[float, ...],
    ) -> tuple[EngineState, Decision] | None:
        """Roll back or halt; ``None`` when no state in the ring is better than the present one."""
        estimators, ledger, saved = state
        verified = m.outcome is not None and m.outcome.restored_step is not None
        if verified:
            assert m.outcome is not None
            # The state that was just restored is itself harmed: it leaves the ring, and the next older one is tried.
            ledger = ledger._replace(slots=tuple(s for s in ledger.slots if s.step != m.outcome.restored_step))
        rung = self._ladder.rung(ledger.ladder, m.step)
        onset = ledger.episode.onset if ledger.episode is not None else m.step
        target = _target(ledger.slots, onset, rung, y)
        if target is None and math.isfinite(y) and not verified:
            return None
        if target is None:
            reason = f"Step {m.step}: {harm}, and no state is left to restore."
            rung = None
        elif rung is None:
            reason = (
                f"Step {m.step}: {harm}, and the rollback budget of {self.settings.rollback_budget} is spent; the best "
                f"certified state, of step {target}, is restored and training halts."
            )
        else:
            reason = f"Step {m.step}: {harm}; the state of step {target} is restored (rung {rung} of the ladder)."
        action = Action.HALT if rung is None else Action.ROLLBACK
        evict = tuple(s.step for s in state.ledger.slots if s.step not in {k.step for k in ledger.slots})
        # States from after the onset are not trusted, whatever their probes said; nor are newer unprobed ones.
        newer = tuple(
            s.step
            for s in ledger.slots
            if target is not None and s.step != target and (s.step >= onset or (s.step > target and not s.certified))
        )
        ledger = ledger._replace(proposed=True, slots=tuple(s for s in ledger.slots if s.step not in newer))
        decision = Decision(
            m.step, action, action, Level.CONFIRMED, ledger.mode, reason, evidence or (_plain(harm),),
            certificate=self._status(ledger), statistics=statistics,
            orders=Orders(restore=target, rung=rung or 0, evict=(*evict, *newer)),
        )  # fmt: skip
        return EngineState(estimators, ledger, saved), decision

    def _cadence(self, ledger: Ledger) -> Cadence:
        return ledger.cadence if ledger.cadence is not None else cadence(self.settings, None)

    def _probe_every(self, ledger: Ledger, step: int) -> int:
        every = self._cadence(ledger).probe_every
        # Warm-up ends with what its probes show, so it must not wait for a slow cadence.
        if ledger.ladder.score:
            # On probation until the ladder is settled: what was released may do harm again.
            every = min(every, 2 * _RECOVERING_PROBES)
        warming = not ledger.warm and step <= 2 * self.settings.warmup_steps and self.settings.probe_every is None
        return min(every, 10) if warming else every

    @staticmethod
    def _status(ledger: Ledger) -> str:
        return "LAPSED" if ledger.lapsed else "HOLDS"

    def _statistics(
        self, state: EngineState, values: tuple[float, ...], drift: DriftResult | None, verdict: _Verdict
    ) -> tuple[float, ...]:
        nan = math.nan
        if verdict.envelope is None:
            probe: tuple[float, ...] = (nan,) * 10
        else:
            p, v = verdict.prediction, verdict.envelope
            probe = (
                verdict.y, p.level if p else nan, p.deviation if p and p.ready else nan, verdict.level, v.start, v.best,
                v.bound, v.allowance, v.standard_error, float(verdict.accepted),
            )  # fmt: skip
        bet = (
            (drift.x, drift.statistic, float(drift.alarm), float(drift.reset))
            if drift is not None
            else (nan, nan, 0.0, 0.0)
        )
        level = state.estimators.loss.gaussian
        z = tuple(i.normalised if isinstance(i, Innovation) else nan if i is None else i for i in values)
        return (*probe, *bet, *z[:8], level.level if level is not None else nan)


class _Verdict(NamedTuple):
    """What one probe says."""

    y: float = math.nan
    level: float = math.nan
    accepted: bool = False
    broken: bool = False
    gated: bool = False
    strained: bool = False
    overfitting: bool = False
    bound: float = math.inf
    envelope: Envelope | None = None
    prediction: ProbePrediction | None = None
    harm: str = ""
    evidence: tuple[Evidence, ...] = ()


def _certain(m: Measurement, *, habitual: bool = False) -> list[Evidence]:
    """Evidence that needs no statistics."""
    found = []
    if m.veto in ("nonfinite", "explosion"):
        what = (
            "the gradient is not finite" if m.veto == "nonfinite" else f"the gradient norm {m.gradient_norm:.4g} is "
            "beyond the gate"
        )
        guarantee = Guarantee.EXACT if m.veto == "nonfinite" else Guarantee.HEURISTIC
        statistic = m.gradient_norm if m.gradient_norm is not None else math.nan
        found.append(Evidence("gradient-gate", statistic, True, guarantee, what))
    if m.loss is not None and not math.isfinite(m.loss):
        found.append(Evidence("loss-finite", m.loss, True, Guarantee.EXACT, "the training loss is not finite"))
    if not m.parameters_finite:
        found.append(Evidence("parameters-finite", math.nan, True, Guarantee.EXACT, "a parameter is not finite"))
    found.extend(
        Evidence("integrity", 1.0, True, Guarantee.EXACT, f"{what.removeprefix('silent ')} changed without a step")
        for what in (() if habitual else _edits(m))
    )
    return found


def _edits(m: Measurement) -> tuple[str, ...]:
    return tuple(t for t in m.tampered if t != OVERWRITE) if m.tampered else ()


def _effective(m: Measurement) -> tuple[float, ...]:
    if m.lr_factor == 1.0:
        return m.learning_rates
    return tuple(rate * m.lr_factor for rate in m.learning_rates)


def _plain(harm: str) -> Evidence:
    return Evidence("policy", math.nan, True, Guarantee.EXACT, harm)


def _restart(ledger: Ledger, objective: int) -> Ledger:
    """A new objective: what was gained on the old one no longer binds."""
    return ledger._replace(
        objective=objective, warm=False, start=math.nan, best=math.inf, standard_error=0.0, probes=0, episode=None,
        declined=False, slots=(), last_snapshot=-(1 << 40), drift=DriftState(), lowest_loss=math.inf,
        ladder=LadderState(), mode=Mode.WATCHING,
    )  # fmt: skip


def _target(slots: tuple[Slot, ...], onset: int, rung: int | None, y: float) -> int | None:
    """The state to restore: before the onset, older on higher rungs; the best certified one for a halt.

    A state whose own probe was no better than ``y``, the present one, is never restored: doing nothing is better.
    """
    certified = [s for s in slots if s.certified]
    if rung is None:
        return min(certified, key=lambda s: s.level).step if certified else (slots[0].step if slots else None)
    better = [s for s in slots if not s.certified or not math.isfinite(y) or s.level < y]
    eligible = [s for s in better if s.step < onset and (rung == 0 or s.certified)]
    if not eligible:
        eligible = [s for s in better if s.certified][:1]
    if not eligible:
        return None
    return eligible[max(0, len(eligible) - 1 - rung)].step


def _looks_again(steps: int) -> bool:
    """Right after a restore probe at every step, then at doubling distances."""
    return steps <= 3 or (steps & (steps - 1)) == 0


def _reason(m: Measurement, level: Level, verdict: _Verdict, evidence: tuple[Evidence, ...]) -> str:
    if m.veto == "nonfinite":
        return f"Step {m.step}: the proposed update was dropped because its gradient is not finite."
    if m.veto == "explosion":
        return f"Step {m.step}: the proposed update was dropped because its gradient norm {m.gradient_norm:.4g} is " \
               "beyond the gate."
    fired = next((item for item in evidence if item.fired), None)
    if verdict.envelope is not None:
        held = f"held-out loss {verdict.y:.4g}, bound {verdict.bound:.4g}"
        if level is Level.SUSPECT and fired is not None:
            return f"Step {m.step} is watched: {fired.message}; {held}."
        return f"Step {m.step} accepted: {held}."
    if fired is not None:
        return f"Step {m.step} is watched: {fired.message}."
    return f"Step {m.step} accepted: no innovation beyond its bound."
