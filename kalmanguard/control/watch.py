"""The watch: run the cheap detectors, open an episode when one fires, and say when a probe is worth its cost."""

from __future__ import annotations

import math

from kalmanguard.control.cadence import cadence
from kalmanguard.control.ledger import Episode, Heard, Ledger
from kalmanguard.detectors.certain import certain
from kalmanguard.detectors.drift import CREDIBLE, DriftResult, DriftState, DriftTest
from kalmanguard.detectors.dynamics import Dynamics
from kalmanguard.detectors.excursion import LearningRateExcursion
from kalmanguard.detectors.fusion import FusionTest
from kalmanguard.detectors.onset import onset
from kalmanguard.detectors.tail import TailTest
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.bank import CHANNELS, Innovations
from kalmanguard.records import Evidence, Innovation, Measurement, Mode
from kalmanguard.settings import Settings

#: Channels whose falls count as much as their rises.
_TWO_SIDED = ("gain", "buffers")
#: Long-run rate of firings of each tail test that is aimed at.
_TAIL_RATE = 1.5e-4
#: A calibrated threshold is not taken lower: on held-out runs it then fires about as often as intended.
_LOWEST_TAIL = 6.0
#: Shares of exceedance that the fused detector bets on.
_BETS = (0.9e-3, 1.1e-2)
#: A learning rate above this many times its moving average has just been raised: a loss that rises is no drift then.
_RAISED = 1.5
_RATE_GAIN = 0.01
#: Steps that a drift takes to lift the statistic out of what healthy training gives.
_DRIFT_START = 8
#: Steps between probes while a learning rate is beyond what has been certified.
_EXCURSION_PROBES = 2
#: Steps between probes of a run that has been restored, and of one on probation after that.
_RECOVERING_PROBES = 8
_PROBATION_PROBES = 16
_WARMUP_PROBES = 11
#: Rows of innovations that an onset is read from.
_RECENT = 32
_DROPPED = ("nonfinite", "explosion")
#: Steps for which a finding of a sensor is not news again; doubled every time.
_FINDING_GAP = 50
#: Gaps of quiet after which it begins at that again.
_FORGOTTEN = 4
#: Edits of parameters between steps after which they count as the user's habit.
HABIT = 3


class Watch:
    """Suspicion: every step, cheap, and allowed to be wrong; all it can do is to buy a probe.

    Parameters
    ----------
    settings
        Thresholds, the drift test's run length, and cadences that the user has fixed.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        calibrated, levels = _calibrated(settings)
        self._on = frozenset(settings.detectors)
        self._tails = tuple(
            TailTest(
                channel,
                threshold=calibrated.get(channel, settings.suspicion),
                rate=_TAIL_RATE,
                two_sided=channel in _TWO_SIDED,
            )
            if channel in self._on
            else None
            for channel in CHANNELS
        )
        self._dynamics = Dynamics(settings.detectors)
        self._fusion = None
        if "fusion" in self._on:
            self._fusion = FusionTest(CHANNELS, levels, run_length=settings.run_length)
        self._drift = DriftTest(run_length=settings.run_length)
        self._excursion = LearningRateExcursion()

    def look(
        self, ledger: Ledger, innovations: Innovations, m: Measurement, *, largest_gradient: float
    ) -> tuple[Ledger, tuple[Evidence, ...], DriftResult | None]:
        """Run all detectors on one step; ``largest_gradient`` is from before it."""
        tails, channels = ledger.tails, innovations.channels
        evidence, ledger, drift = self._detect(ledger, channels, m)
        if not evidence:
            return ledger, evidence, drift
        episode = ledger.episode
        began = self._onset(ledger, m) if episode is None else m.step
        # A sensor's finding is a reason to look; harm that a probe then shows is explained by innovations alone.
        explained = not m.findings or any(item not in m.findings for item in evidence)
        episode = (
            Episode(began, m.step, explained, next_probe=m.step, tails=tails, gradient=largest_gradient or math.inf)
            if episode is None
            else episode._replace(last=m.step, explained=explained or episode.explained, next_probe=m.step, gap=1)
        )
        drifted = any(item.detector == "drift" for item in evidence)
        if drifted and max(m.learning_rates, default=0.0) <= _RAISED * ledger.rate:
            # The alarm comes long after the drift began: go back to before that.
            began = m.step - ledger.drift.risen_for - _DRIFT_START
            episode = episode._replace(drifted=True, onset=min(episode.onset, began))
        return ledger._replace(episode=episode), evidence, drift

    def _onset(self, ledger: Ledger, m: Measurement) -> int:
        """First step that the innovations were off at, by their change point; this one unless they show more."""
        if "onset" not in self._on or not ledger.warm:
            return m.step
        window = [tuple(math.nan if i is None else i.normalised for i in row) for row in ledger.recent]
        change = onset(window)
        return m.step if change is None else m.step - change.ago + 1

    def wants_probe(self, ledger: Ledger, step: int) -> bool:
        """Whether this step is worth a probe."""
        if ledger.mode is Mode.HALTED:
            return False
        since = step - ledger.last_probe
        if ledger.probes == 0 or since >= self._probe_every(ledger, step):
            return True
        if ledger.episode is not None and step >= ledger.episode.next_probe:
            return True
        if ledger.excursion.raised and since >= _EXCURSION_PROBES:
            return True
        recovering = ledger.mode is Mode.RECOVERING
        return recovering and (since >= _RECOVERING_PROBES or _looks_again(step - ledger.ladder.restored_at))

    def _probe_every(self, ledger: Ledger, step: int) -> int:
        settings = self._settings
        every = (ledger.cadence or cadence(settings, None)).probe_every
        if ledger.ladder.score:
            # On probation until the ladder is settled: what was released may do harm again.
            every = min(every, _PROBATION_PROBES)
        # Warm-up ends with what its probes show, so it must not wait for a slow cadence.
        age = step - ledger.began
        if not ledger.warm and settings.probe_every is None:
            # Once it lasts, at distances that grow with its age: no progress is a reason to look, too.
            late = age > 2 * settings.warmup_steps
            every = min(every, max(_WARMUP_PROBES, age // 4) if late else _WARMUP_PROBES)
        return every

    def _detect(
        self, ledger: Ledger, innovations: tuple[Innovation | None, ...], m: Measurement
    ) -> tuple[tuple[Evidence, ...], Ledger, DriftResult | None]:
        found: list[Evidence] = []
        warm = ledger.warm or m.step - ledger.began > self._settings.warmup_steps
        tails = ledger.tails
        drift, drift_state, lowest = None, ledger.drift, ledger.lowest_loss
        excursion = ledger.excursion
        now = max(m.learning_rates, default=0.0)
        rate = now if ledger.rate == 0.0 else ledger.rate + _RATE_GAIN * (now - ledger.rate)
        if warm:
            for index, innovation in enumerate(innovations):
                test = self._tails[index]
                if innovation is None or test is None:
                    continue
                tail, evidence = test.step(tails[index], innovation)
                # One episode counts once: a shift that lasts must not raise the threshold at every step.
                if tail is not tails[index] and (evidence is None or ledger.episode is None):
                    tails = (*tails[:index], tail, *tails[index + 1 :])
                if evidence is not None:
                    found.append(evidence)
            if "learning-rate" in self._on:
                excursion, evidence = self._excursion.step(excursion, _effective(m))
                if evidence is not None:
                    found.append(evidence)
        else:
            excursion = self._excursion.learn(excursion, _effective(m))
        first = ledger.first_loss
        if m.loss is not None and math.isfinite(m.loss):
            first = m.loss if math.isnan(first) else first
            drift_state, drift, evidence = self._drift.step(drift_state, m.loss)
            if "drift" not in self._on:
                drift = evidence = None
            if evidence is not None and not _is_credible(ledger, first, drift_state):
                evidence = None  # the alarm stays on record, for claim C4
            if evidence is not None:
                found.append(evidence)
            if drift_state.level is not None and warm:
                lowest = min(lowest, drift_state.level)
        found.extend(certain(m, habitual=ledger.tampered > HABIT))
        recent = ledger.recent
        if "onset" in self._on and m.veto not in _DROPPED:  # what was dropped has moved nothing
            recent = (*recent[1 - _RECENT :], innovations)
        fusion = ledger.fusion
        if self._fusion is not None and warm:
            scores = [None if i is None else _score(i) for i in innovations]
            fusion, evidence = self._fusion.step(fusion, scores)
            if evidence is not None:
                found.append(evidence)
        dynamics = ledger.dynamics
        if self._dynamics and m.veto is None:
            applied = max(m.learning_rates, default=0.0) * m.lr_factor
            dynamics, more = self._dynamics.step(dynamics, m.step, m.velocity, applied, innovations[0])
            found.extend(more if warm else ())
        heard = ledger.heard
        if m.findings:
            heard, news = _news(heard, m)
            found.extend(news)
        return (
            tuple(found),
            ledger._replace(
                heard=heard,
                recent=recent,
                dynamics=dynamics,
                fusion=fusion,
                tails=tails,
                drift=drift_state,
                excursion=excursion,
                lowest_loss=lowest,
                rate=rate,
                first_loss=first,
            ),
            drift,
        )


def _calibrated(settings: Settings) -> tuple[dict[str, float], dict[str, tuple[tuple[float, float], ...]]]:
    """Per channel the threshold of its tail test, and what may exceed which threshold how often."""
    if settings.calibration is None:
        return {}, {}
    if isinstance(settings.calibration, str):
        raise ConfigurationError(
            f"calibration = {settings.calibration!r} is still a name, which a supervisor reads; an engine needs what "
            "kalmanguard.calibration.load(...).pairs() gives for it."
        )
    tails: dict[str, float] = {}
    levels: dict[str, tuple[tuple[float, float], ...]] = {}
    for channel, pairs in settings.calibration.items():
        known = tuple((1.0 - float(level), float(threshold)) for level, threshold in pairs)
        levels[channel] = tuple(pair for pair in known if _BETS[0] <= pair[0] <= _BETS[1])
        rare = [threshold for alpha, threshold in known if alpha <= 1.01 * _TAIL_RATE]
        if rare:
            tails[channel] = max(rare[0], _LOWEST_TAIL)
    return tails, levels


def _score(innovation: Innovation) -> float:
    z = innovation.normalised
    return abs(z) if innovation.channel in _TWO_SIDED else z


def _news(heard: tuple[Heard, ...], m: Measurement) -> tuple[tuple[Heard, ...], list[Evidence]]:
    """Suspicious findings of sensors that have not told any just before: one that never stops buys few probes."""
    news = []
    for finding in m.findings:
        if not finding.fired:
            continue
        sensor = finding.detector.partition(".")[0]
        last = next((h for h in heard if h.sensor == sensor), None)
        if last is not None and m.step < last.until:
            continue
        # One that has been quiet for long is listened to as at first.
        again = last is not None and m.step - last.until < _FORGOTTEN * last.gap
        gap = 2 * last.gap if last is not None and again else _FINDING_GAP
        heard = (*(h for h in heard if h is not last), Heard(sensor, m.step + gap, gap))
        news.append(finding)
    return heard, news


def _is_credible(ledger: Ledger, first: float, drift: DriftState) -> bool:
    """Whether the training loss has ever left its own noise: else its drift means nothing."""
    level = ledger.drift.level
    highest = first if level is None else max(first, level)
    return highest - ledger.lowest_loss > CREDIBLE * drift.scale.deviation


def _effective(m: Measurement) -> tuple[float, ...]:
    if m.lr_factor == 1.0:
        return m.learning_rates
    return tuple(rate * m.lr_factor for rate in m.learning_rates)


def _looks_again(steps: int) -> bool:
    """Right after a restore probe at every step, then at doubling distances."""
    return steps <= 3 or (steps & (steps - 1)) == 0
