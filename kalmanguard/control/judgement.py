"""The judgement of a probe: inside the envelope, a spike that heals, overfitting, or harm to be undone."""

from __future__ import annotations

import math
from typing import NamedTuple

from kalmanguard.control.envelope import Envelope, EnvelopeRule
from kalmanguard.control.ledger import Episode, Ledger
from kalmanguard.detectors.drift import CREDIBLE
from kalmanguard.detectors.paired import paired_standard_error, paired_test
from kalmanguard.estimators.bank import Estimators
from kalmanguard.estimators.probe import ProbeFilter, ProbePrediction
from kalmanguard.estimators.wander import wandered
from kalmanguard.records import Evidence, Guarantee, Measurement, Mode, ProbeReading
from kalmanguard.settings import Settings

#: Probes that warm-up needs at least.
PROBES = 3
#: Innovation of the probe, in tracked standard deviations, above which a state is not certified.
_PROBE_GATE = 6.0
#: Steps after the last suspicion during which nothing is certified.
_QUIET = 5
#: Shares of the give-back that count as harm if it lasts: when its cause is known to last, and when there is one.
_LASTING_SHARE = 0.25
_EXPLAINED_SHARE = 0.5
#: The same for a run that has just been restored.
_RECOVERING_SHARE = 0.125
#: During warm-up a state is harmed that is worse than before training, on the probe and on its own batches: by this
#: share of the first loss's magnitude, and the probe by so many standard errors. What cannot have progressed yet
#: has no progress to lose, and a probe that rises alone may be what was asked for.
_UNTRAINED_FRAC, _UNTRAINED_ERRORS = 0.5, 10.0
#: Times ``hold`` after which a restored run that has not come back counts as harmed again.
_PATIENT_HOLDS = 3
#: Probes in a row, each above the one before, after which it counts so at once.
_CLIMBS = 6
#: Standard errors of the paired difference above which harm is one of most examples, and above which it is any.
_EVERYWHERE, _CREDIBLE_RISE = 5.0, 3.0
_ERROR_GAIN = 0.2
#: A scale of n readings is widened by so much over n: about the quantile of Student's t over the normal one, at 4; and
#: from so many on it is one.
_FEW, _LEAST = 6.0, 5


class Verdict(NamedTuple):
    """What one probe says; the defaults are those of a step without a probe.

    ``accepted``: inside the bound and as predicted. ``broken``: above the bound. ``strained``: above the inner line
    that counts as harm if it lasts. ``harm``: why the step must be undone, as a clause; empty when it need not.
    """

    y: float = math.nan
    level: float = math.nan
    accepted: bool = False
    broken: bool = False
    strained: bool = False
    overfitting: bool = False
    bound: float = math.inf
    envelope: Envelope | None = None
    prediction: ProbePrediction | None = None
    harm: str = ""
    evidence: tuple[Evidence, ...] = ()


class Judge:
    """Confirmation: what a probe says against the envelope, and how long harm must last to be undone.

    Parameters
    ----------
    settings
        The envelope's constants and the patience.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._probe = ProbeFilter()
        self._rule = EnvelopeRule(
            give_back=settings.give_back,
            standard_errors=settings.standard_errors,
            floor_frac=settings.floor_frac,
        )

    def judge(
        self, e: Estimators, ledger: Ledger, m: Measurement, probe: ProbeReading
    ) -> tuple[Estimators, Ledger, Verdict]:
        """Judge one probe, and learn from it."""
        y, elapsed = probe.mean, max(m.step - ledger.last_probe, 1)
        ledger = ledger._replace(probes=ledger.probes + 1, last_probe=m.step)
        if not math.isfinite(y):
            harm = "the held-out loss is not finite"
            return e, ledger, Verdict(y=y, harm=harm, evidence=(Evidence("probe", y, True, Guarantee.EXACT, harm),))
        if math.isnan(ledger.start):
            error = paired_standard_error(probe.losses, 0.0 * probe.losses)
            ledger = ledger._replace(start=y, best=y, last_accepted=m.step, start_error=error)
            e = e._replace(probe=self._probe.update(e.probe, y, 0.0), reference=probe.losses)
            return e, ledger, Verdict(y=y, level=y, accepted=True, envelope=self._line(ledger))
        floor = max(ledger.standard_error, 1e-4 * abs(ledger.best), 1e-12)
        verdict = self._measure(e, ledger, m, probe, floor)
        if verdict.strained:
            ledger, verdict = self._weigh(ledger, m, verdict, elapsed)
        if ledger.mode is Mode.RECOVERING and not self.is_back(ledger, y):
            ledger, verdict = self._expect_return(ledger, m, verdict)
        ledger = ledger._replace(last_y=y)
        if not verdict.broken or verdict.overfitting:
            e = e._replace(probe=self._probe.update(e.probe, y, floor))
        if not verdict.accepted:
            return e, ledger, verdict
        # After a dropped step the state is the same one, so the difference says nothing about the noise between two.
        if m.veto not in ("nonfinite", "explosion"):
            e, error = self._learn(e, ledger.standard_error, probe)
            ledger = ledger._replace(standard_error=error)
        assert e.probe.gaussian is not None
        # The filtered level, which differs little from the probe; never below what the probe itself has shown.
        level = max(e.probe.gaussian.level, y)
        ledger = ledger._replace(best=min(ledger.best, level), last_accepted=m.step, declined=False)
        return e._replace(reference=probe.losses), ledger, verdict._replace(level=level)

    def _learn(self, e: Estimators, known: float, probe: ProbeReading) -> tuple[Estimators, float]:
        """Standard error of the difference between two probes; 0 while nothing is known of it.

        A mean alone, as logs hold it, does not tell: it is as uncertain as such means have wandered so far.
        """
        if _comparable(e, probe):
            assert e.reference is not None
            error = paired_standard_error(probe.losses, e.reference)
            return e, error if known == 0 else known + _ERROR_GAIN * (error - known)
        if len(probe.losses) > 1:
            return e, known
        prediction = self._probe.predict(e.probe, 0.0)
        off = prediction.deviation if prediction is not None and prediction.ready else math.inf
        e = e._replace(wander=wandered(e.wander, probe.mean, off))
        seen = e.wander.kinks.seen
        return e, float((1.0 + _FEW / seen) * e.wander.deviation) if seen >= _LEAST else known

    def _line(self, ledger: Ledger, share: float = 1.0) -> Envelope:
        return self._rule.of(ledger.start, ledger.best, ledger.standard_error, share=share)

    def _measure(self, e: Estimators, ledger: Ledger, m: Measurement, probe: ProbeReading, floor: float) -> Verdict:
        """Hold a probe against the envelope, its prediction, and the inner lines."""
        y, envelope = probe.mean, self._line(ledger)
        prediction = self._probe.predict(e.probe, floor)
        bound, line = envelope.bound, envelope.bound
        if ledger.ladder.score:
            # A restored run must show that it no longer degrades, also once its learning rate is back: it is held
            # closer until the ladder is settled.
            closer = self._line(ledger, _RECOVERING_SHARE).allowance
            bound = min(bound, max(ledger.ladder.level, ledger.best) + closer)
        episode = ledger.episode
        if self._lasts(ledger, m) or self._goes_on(ledger, m):
            line = self._line(ledger, _LASTING_SHARE).bound
        elif episode is not None and episode.explained:
            line = self._line(ledger, _EXPLAINED_SHARE).bound
        if not ledger.warm:
            line = self._untrained(ledger, m)
            bound = line if line < math.inf else bound
        broken = y > (bound if ledger.warm else line)
        gated = ledger.warm and prediction is not None and prediction.ready and _beyond(y, prediction)
        evidence: list[Evidence] = []
        if _comparable(e, probe):
            assert e.reference is not None
            evidence.append(paired_test(probe.losses, e.reference))
        if broken:
            lost = envelope.give_back(y)
            message = f"held-out loss {y:.4g} is above its bound {bound:.4g}: {_loss_of(lost, envelope)}"
            evidence.append(Evidence("envelope", lost, True, Guarantee.EXACT, message))
        elif gated and prediction is not None:
            off = (y - prediction.level) / prediction.deviation
            message = f"held-out loss {y:.4g} was predicted to be {prediction.level:.4g} +- {prediction.deviation:.2g}"
            evidence.append(Evidence("probe-innovation", off, True, Guarantee.HEURISTIC, message))
        return Verdict(
            y=y,
            accepted=not broken and not gated,
            broken=broken,
            strained=broken or y > line,
            bound=bound,
            envelope=envelope,
            prediction=prediction,
            evidence=tuple(evidence),
        )

    def _untrained(self, ledger: Ledger, m: Measurement) -> float:
        """The bound during warm-up: none at its beginning, when early steps may overshoot, then the first probe's."""
        if m.step - ledger.began < self._settings.warmup_steps or not self._is_worse_than_untrained(ledger, m):
            return math.inf
        # A loss that began at its optimum can only rise, and there is nothing that says how far it may.
        errors = _UNTRAINED_ERRORS * ledger.start_error
        if abs(ledger.start) <= errors:
            return math.inf
        return ledger.start + max(_UNTRAINED_FRAC * abs(ledger.start), errors)

    @staticmethod
    def _expect_return(ledger: Ledger, m: Measurement, verdict: Verdict) -> tuple[Ledger, Verdict]:
        """A restored run that is not back yet: has it had time enough, or does it move away?"""
        ledger = ledger._replace(climbed=ledger.climbed + 1 if verdict.y > ledger.last_y else 0)
        since = m.step - ledger.ladder.restored_at
        if since < _PATIENT_HOLDS * ledger.ladder.hold and ledger.climbed < _CLIMBS:
            return ledger, verdict
        harm = (
            f"the held-out loss {verdict.y:.4g} moves away from the restored {ledger.ladder.level:.4g}, {since} steps "
            "after the last rollback"
        )
        return ledger, verdict._replace(harm=harm)

    def _lasts(self, ledger: Ledger, m: Measurement) -> bool:
        """Whether what is suspected will not go away by itself: a drift, a raised learning rate, or a steady climb."""
        episode = ledger.episode
        if ledger.excursion.raised:
            return True
        if episode is None:
            return False
        climbs = episode.explained and episode.rising >= self._settings.patience and self._shows(ledger, m)
        level = ledger.drift.level
        return climbs or (episode.drifted and level is not None and self._has_lost(ledger, level, _LASTING_SHARE))

    def _goes_on(self, ledger: Ledger, m: Measurement) -> bool:
        """Whether innovations go on at this very step, and the training loss shows harm of its own."""
        episode = ledger.episode
        return episode is not None and episode.explained and episode.last == m.step and self._shows(ledger, m)

    @staticmethod
    def _is_worse_than_untrained(ledger: Ledger, m: Measurement) -> bool:
        """Whether the training loss lies far above what it began at."""
        # Negated, so that a loss that is nan counts; without any loss nothing is known.
        first = ledger.first_loss
        return m.loss is not None and not m.loss <= first + _UNTRAINED_FRAC * abs(first)

    @staticmethod
    def is_hopeless(ledger: Ledger, m: Measurement) -> bool:
        """Whether the training loss has lost all of its progress: on this batch the model is worse than untrained."""
        return m.loss is not None and ledger.first_loss > ledger.lowest_loss and not m.loss <= ledger.first_loss

    def _shows(self, ledger: Ledger, m: Measurement) -> bool:
        """Whether the training loss has lost the share of the progress that may be lost.

        An optimizer that has fitted its data has spikes of its own, many deviations high and small beside what was
        gained; they heal. Wrong labels or weights show in the training loss at once.
        """
        return m.loss is not None and self._has_lost(ledger, m.loss, 1.0)

    def _has_lost(self, ledger: Ledger, loss: float, share: float) -> bool:
        # In its own unit: a training loss may be a sum, or scaled, where the probe's is not.
        progress = ledger.first_loss - ledger.lowest_loss
        # A loss that has never fallen out of its own noise (of a policy, of a GAN) has no progress to lose.
        noise = CREDIBLE * ledger.drift.scale.deviation
        # The second is negated, so that a loss that is nan shows it too.
        return progress > noise and not loss - ledger.lowest_loss <= share * self._settings.give_back * progress

    def _weigh(self, ledger: Ledger, m: Measurement, verdict: Verdict, elapsed: int) -> tuple[Ledger, Verdict]:
        """Above the inner line: harm to be undone, a spike that heals by itself, or overfitting?

        Severe harm that an innovation explains is undone at once, and so is harm that is about to leave the envelope
        while the innovations go on, or has left it under a learning rate that was never certified. Moderate harm is
        given time: it is confirmed when it grows, or when it has not fallen by a third over probes at doubling
        distances. So is harm short of an untrained model that a few examples make up: damage to a model shows on most
        of them, while the spikes of an optimizer that has fitted its data throw single ones far off, and heal. Without
        any innovation to explain it, harm is given four times as long, since healthy training has such spikes and
        recovers from them. With one, half of the bound counts as harm if it lasts, and a quarter while its cause lasts.
        """
        assert verdict.envelope is not None
        raised = ledger.excursion.raised
        episode = ledger.episode or Episode(max(ledger.last_accepted + 1, 1), m.step, explained=raised)
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
        patience, risen = self._settings.patience, _risen(verdict)
        lasts = episode.broken >= patience + (2 if episode.explained else 4) and excess > 0.67 * episode.worst
        if verdict.broken and raised:
            confirmed = True
        elif give_back > max(0.5, 2.5 * self._settings.give_back):
            severe = episode.explained or (episode.broken >= 2 and excess > 0.8 * previous)
            confirmed = lasts or (severe and (risen > _EVERYWHERE or give_back > 1.0))
        elif self._goes_on(ledger, m) and self._leaves(verdict, episode, elapsed) and risen > _EVERYWHERE:
            confirmed = True
        elif not verdict.broken:
            last = 2 if self._lasts(ledger, m) else patience + 2
            confirmed = episode.broken >= last and excess > 0.67 * episode.worst
        elif ledger.ladder.score:
            climbs = episode.rising + (verdict.y > episode.y) > patience
            confirmed = (episode.broken >= patience + 2 or climbs) and risen > _CREDIBLE_RISE
        else:
            climbing = episode.rising + (verdict.y > episode.y) >= patience
            growing = episode.explained and (climbing or (episode.broken >= patience and excess > 1.15 * episode.first))
            confirmed = lasts or (growing and risen > _EVERYWHERE)
        if not confirmed:
            return ledger, verdict
        where = (
            "has left its bound" if verdict.broken else "stays above or moves away from its best level, below its bound"
        )
        harm = (
            f"the held-out loss {verdict.y:.4g} {where} {verdict.bound:.4g} (best {verdict.envelope.best:.4g}): "
            f"{_loss_of(give_back, verdict.envelope)}"
        )
        return ledger, verdict._replace(harm=harm)

    @staticmethod
    def _leaves(verdict: Verdict, episode: Episode, elapsed: int) -> bool:
        """Whether the next step leaves the envelope if harm goes on to double, as it does while momentum builds up."""
        assert verdict.envelope is not None
        risen = verdict.y - episode.y
        return risen > 0 and verdict.y + 2.0 * risen / elapsed > verdict.envelope.bound

    def is_back(self, ledger: Ledger, y: float) -> bool:
        """Whether a restored run is where it was restored to, or better, within the probe's noise."""
        line = self._rule.of(ledger.ladder.level, ledger.ladder.level, ledger.standard_error)
        return not ledger.warm or y <= line.bound

    def _overfits(self, ledger: Ledger, m: Measurement, verdict: Verdict) -> bool:
        state = ledger.drift
        if not ledger.warm or m.loss is None or state.level is None:
            return False
        if verdict.prediction is None or not verdict.prediction.ready:
            return False
        lowest = state.level <= ledger.lowest_loss + 0.5 * state.scale.deviation
        return lowest and not _beyond(verdict.y, verdict.prediction)

    def follow_up(self, ledger: Ledger, m: Measurement, verdict: Verdict) -> Ledger:
        """Decide when an episode is looked at again, and when it is over."""
        episode = ledger.episode
        if verdict.overfitting:
            return ledger
        if verdict.accepted and not verdict.strained:
            if episode is None:
                return ledger
            if m.step - episode.last >= _QUIET and not ledger.excursion.raised:
                # It came to nothing, so a state that was captured in it is as good as any other.
                slots = tuple(s._replace(suspect=False) for s in ledger.slots)
                return ledger._replace(episode=None, recent=(), slots=slots)
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

    def end_warmup(self, ledger: Ledger, m: Measurement) -> Ledger:
        """Leave warm-up once enough was probed and something was gained, or after ten times as long."""
        settings, age = self._settings, m.step - ledger.began
        if age < settings.warmup_steps or ledger.probes < PROBES or math.isnan(ledger.start):
            return ledger
        if ledger.standard_error == 0 and ledger.probes < 3 * PROBES:
            return ledger  # where nothing is known of a probe's noise, nothing is known of its progress
        floor = self._rule.of(ledger.best, ledger.best, ledger.standard_error).allowance
        progressed = ledger.start - ledger.best > 2.0 * floor
        if progressed or age >= 10 * settings.warmup_steps:
            return ledger._replace(warm=True)
        return ledger


def _loss_of(give_back: float, envelope: Envelope) -> str:
    """What a share of the progress means, in words."""
    if give_back > 1.0:
        return f"it is worse than before training, when it was {envelope.start:.4g}"
    return f"{100 * give_back:.0f} % of the progress from {envelope.start:.4g} to {envelope.best:.4g} is given back"


def _comparable(e: Estimators, probe: ProbeReading) -> bool:
    # A log holds means alone: there is nothing to pair then.
    return e.reference is not None and len(e.reference) == len(probe.losses) > 1


def _risen(verdict: Verdict) -> float:
    """Standard errors by which the paired examples have risen; inf without pairs."""
    return next((item.statistic for item in verdict.evidence if item.detector == "paired-probe"), math.inf)


def _beyond(y: float, prediction: ProbePrediction) -> bool:
    return y > prediction.level + _PROBE_GATE * prediction.deviation
