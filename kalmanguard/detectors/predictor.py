"""The failure predictor: a classifier that was trained on runs which failed, asked before the failure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, final

from kalmanguard.detectors.classifiers import probability
from kalmanguard.detectors.predictor_file import PredictorFile, read_predictor
from kalmanguard.estimators.features import FEATURES, FeatureBank, FeatureState
from kalmanguard.records import Decision, Evidence, Guarantee, Level, Measurement

#: Steps from which on there is a forecast: the slow averages have a memory of 20, the certified range is known.
_WARMUP_STEPS = 30
#: Contributions that a message names.
_NAMED = 3
#: Never fired, for the clock of firings.
_LONG_AGO = 1 << 30


class PredictorState(NamedTuple):
    """Features of the run, the objective that they belong to, and the steps since the predictor fired last."""

    features: FeatureState = FeatureState()
    objective: int = 0
    quiet_for: int = _LONG_AGO


class Forecast(NamedTuple):
    """What is expected of the next ``horizon`` steps.

    ``probability`` is that of a failure within them, as frequent as failures were in training, and ``nan`` while the
    predictor abstains. ``evidence`` is there exactly when it fired.
    """

    probability: float
    horizon: int
    fired: bool = False
    evidence: Evidence | None = None


@final
class FailurePredictor:
    """``P(more than a share of the progress is given back within the next H steps | features)``, and when to say so.

    It fires when the probability reaches the file's threshold, and again after ``H`` steps for as long as it stays
    there.

    Parameters
    ----------
    file
        A trained predictor: `load` reads one.
    statistics
        Names of `Decision.statistics` in their order: `kalmanguard.engine.STATISTICS`.

    Raises
    ------
    ConfigurationError
        The file's trees are not trees, or a needed statistic is missing.

    Notes
    -----
    Guarantee: HEURISTIC. Both the probability and the rate of false alarms hold for runs like those it was trained on;
    what it does on an architecture that it has never seen, and what it adds to the other detectors, is measured on the
    page *Benchmarks*. It cannot foresee what has no cause yet: a flipped bit, a bad batch, a rate that is about
    to be raised. It abstains for 30 steps and while the supervisor warms up, and starts anew with a new objective.
    After a rollback, the state of the restored step should be restored with it. Cost: 9 us a step for the logistic
    predictor and 14 us for the trees (``python -m benchmarks predictor``); when it fires, 51 classifications more.

    Examples
    --------
    >>> from kalmanguard.engine import STATISTICS, Engine
    >>> from kalmanguard.settings import Settings
    >>> engine, predictor = Engine(Settings()), FailurePredictor.load("default", statistics=STATISTICS)
    >>> state, forecasting = engine.init(), PredictorState()
    >>> m = Measurement(step=1, loss=2.3, learning_rates=(0.1,))
    >>> state, decision = engine.step(state, m)
    >>> forecasting, forecast = predictor.step(forecasting, m, decision)
    >>> forecast.fired, forecast.horizon
    (False, 50)
    """

    def __init__(self, file: PredictorFile, *, statistics: Sequence[str]) -> None:
        self.horizon, self.threshold = file.horizon, file.threshold
        self._harm, self._typical = file.harm, tuple(file.typical)
        self._classifier = file.classifier()
        self._bank = FeatureBank(statistics)

    @classmethod
    def load(cls, name: str | Path, *, statistics: Sequence[str]) -> FailurePredictor:
        """Load a shipped predictor by name, or one of yours by the path of its file (see `read_predictor`)."""
        return cls(read_predictor(name), statistics=statistics)

    def init(self) -> PredictorState:
        """The state before the first step."""
        return PredictorState()

    def step(self, state: PredictorState, m: Measurement, decision: Decision) -> tuple[PredictorState, Forecast]:
        """Fold in one step and what the engine said of it; never raises on numbers that are not finite."""
        if m.objective != state.objective:
            state = PredictorState(objective=m.objective)
        known = self._bank.step(state.features, m, decision.statistics)
        quiet_for = state.quiet_for + 1
        if known.seen < _WARMUP_STEPS or decision.level is Level.WARMUP:
            return PredictorState(known, m.objective, quiet_for), Forecast(math.nan, self.horizon)
        features = known.features
        expected = probability(self._classifier.log_odds(features))
        if expected < self.threshold or quiet_for < self.horizon:
            return PredictorState(known, m.objective, quiet_for), Forecast(expected, self.horizon)
        evidence = self._evidence(expected, features)
        return PredictorState(known, m.objective, 0), Forecast(expected, self.horizon, True, evidence)

    def contributions(self, features: Sequence[float]) -> tuple[float, ...]:
        """How far the log odds fall when a feature alone is put back to what is typical of healthy training."""
        whole, row = self._classifier.log_odds(features), list(features)
        found = []
        for index, typical in enumerate(self._typical):
            kept, row[index] = row[index], typical
            found.append(whole - self._classifier.log_odds(row))
            row[index] = kept
        return tuple(found)

    def _evidence(self, expected: float, features: tuple[float, ...]) -> Evidence:
        ranked = sorted(zip(self.contributions(features), FEATURES, strict=True), reverse=True)
        named = [f"{name} ({gain:+.1f})" for gain, name in ranked[:_NAMED] if gain > 0]
        message = (
            f"{100 * expected:.0f} % that more than {100 * self._harm:.0f} % of the progress is given back within "
            f"{self.horizon} steps; {100 * self.threshold:.0f} % is the bound"
        )
        if named:
            message += f"; it comes from, in log odds: {', '.join(named)}"
        return Evidence("predictor", expected, True, Guarantee.HEURISTIC, message)
