"""The dynamics of the trajectory, judged once in a block of steps: growth, oscillation, alternation, damping, regime.

Diagnostics: none of them is on by default, since none adds to what the cheap tests and the probe see (the ablation in
``docs/benchmarks.md``). `Settings.detectors` switches them on by name; what fires is a suspicion and buys a probe.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from kalmanguard.detectors.damping import DampingStatus, damping, jerk_ratio
from kalmanguard.detectors.lyapunov import lyapunov
from kalmanguard.detectors.oscillation import period_two, spectral_line, whiten
from kalmanguard.detectors.tail import TailState, TailTest
from kalmanguard.estimators.autocovariance import BLOCK, BLOCKS, AutocovarianceState, observe, total
from kalmanguard.estimators.noise import Scale, track
from kalmanguard.estimators.regimes import RegimeFilter, RegimeState
from kalmanguard.records import Evidence, FloatArray, Guarantee, Innovation

#: Names in `Settings.detectors`, in order.
NAMES = ("lyapunov", "oscillation", "period-two", "damping", "regimes")
#: Steps of the windows of log speeds, of innovations and of the first coordinates of the velocities.
WINDOW = 64
#: Coordinates of the sketch that the spectrum is taken of: each is a random projection of the whole update.
COORDINATES = 8
#: Growth of the updates over a window that counts: eightfold at its lower confidence bound.
_GROWN = math.log(8.0)
#: Scores in their own unit: minus the log of the p-value, standard errors, deviations of the log ratio.
_LINE, _ALTERNATION, _RATIO = 18.0, 6.0, 8.0
_RATE = 1.5e-4 * BLOCK
#: Longer updates per unit of learning rate have no fourth power; what is so far gone needs no diagnosis.
_LONGEST = 1e60
_MEMORY = 20


class DynamicsState(NamedTuple):
    """Windows, autocovariances, the baseline of the jerk ratio, the regime, and one threshold per test.

    ``last`` and ``gap``: the step of the last velocity, and the distance to the one before; a sketch that is thinned
    out has a distance above 1, and where it changes everything starts anew.
    """

    covariance: AutocovarianceState = AutocovarianceState()
    speeds: tuple[float, ...] = ()
    heads: tuple[FloatArray, ...] = ()
    scores: tuple[float, ...] = ()
    ratio: float = math.nan
    spread: Scale = Scale()
    regime: RegimeState | None = None
    tails: tuple[TailState, ...] = (TailState(),) * 6
    last: int = -1
    gap: int = 0


class Dynamics:
    """The tests that are switched on, each with a threshold that holds its long-run rate of firings (`TailTest`).

    Parameters
    ----------
    names
        Of `NAMES`.

    Notes
    -----
    Guarantee: HEURISTIC. Cost: five dot products a step, the judgement once in 16 steps, and the regimes at every step.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names) & frozenset(NAMES)
        self._regimes = RegimeFilter()
        self._tests = tuple(
            TailTest(channel, threshold=threshold, rate=_RATE, two_sided=channel == "damping")
            for channel, threshold in (
                ("lyapunov", 1.0), ("oscillation", _LINE), ("velocity spectrum", _LINE), ("period-two", _ALTERNATION),
                ("damping", _RATIO), ("regimes", 1.0),
            )
        )  # fmt: skip

    def __bool__(self) -> bool:
        return bool(self._names)

    def step(
        self, state: DynamicsState, step: int, velocity: FloatArray | None, rate: float, loss: Innovation | None
    ) -> tuple[DynamicsState, list[Evidence]]:
        """Take in one step: its velocity (``None`` where the sketch was not taken), learning rate, loss innovation."""
        found: list[Evidence] = []
        if loss is not None:
            z = max(-1e6, min(1e6, loss.normalised))
            state = state._replace(scores=(*state.scores[1 - WINDOW :], z))
            if "regimes" in self._names:
                state = self._regime(state, z, found)
        if velocity is None or not rate > 0.0:
            return state, found
        length = math.sqrt(float(velocity.dot(velocity)))
        if not 0.0 < length / rate < _LONGEST:
            return state, found
        gap = step - state.last
        if gap != state.gap:
            state = DynamicsState(tails=state.tails, regime=state.regime, scores=state.scores, gap=gap)
        per_rate = velocity / rate
        state = state._replace(
            covariance=observe(state.covariance, per_rate),
            speeds=(*state.speeds[1 - WINDOW :], math.log(length / rate)),
            heads=(*state.heads[1 - WINDOW :], per_rate[:COORDINATES]),
            last=step,
        )
        if state.covariance.filled == 0 and len(state.speeds) == WINDOW and len(state.covariance.blocks) >= BLOCKS // 2:
            state = self._judge(state, found)
        return state, found

    def _judge(self, state: DynamicsState, found: list[Evidence]) -> DynamicsState:
        blocks = state.covariance.blocks
        if "lyapunov" in self._names:
            growth = lyapunov(state.speeds)
            low = (growth.exponent - 4.0 * growth.standard_error) * WINDOW
            state = self._test(
                state, 0, growth.exponent / state.gap, (low if low > 0.0 else 0.0) / _GROWN, "per step", found
            )
        if "oscillation" in self._names:
            if len(state.scores) == WINDOW:
                line = spectral_line(np.array(state.scores))
                state = self._test(state, 1, line.frequency, _surprise(line.p_value), "cycles per step", found)
            white = whiten(np.array(state.heads), total(blocks))
            line = spectral_line(white, rank=_rank(white))
            state = self._test(state, 2, line.frequency / state.gap, _surprise(line.p_value), "cycles per step", found)
        if "period-two" in self._names:
            cosine = period_two(blocks)
            error = (cosine.high - cosine.low) / 5.0
            score = (-0.5 - cosine.estimate) / error if error > 0.0 else 0.0
            state = self._test(state, 3, cosine.estimate, max(score, 0.0), "mean cosine of updates", found)
        if "damping" in self._names:
            state = self._damping(state, found)
        return state

    def _damping(self, state: DynamicsState, found: list[Evidence]) -> DynamicsState:
        ratio = jerk_ratio(state.covariance.blocks[-1])
        if not ratio > 0.0:
            return state
        log_ratio = math.log(ratio)
        if math.isnan(state.ratio):
            return state._replace(ratio=log_ratio)
        off = log_ratio - state.ratio
        if state.spread.seen >= BLOCKS:
            score = off / max(state.spread.deviation, 0.02)
            state = self._test(state, 4, ratio, score, "jerk over acceleration", found)
        if damping(state.covariance.blocks).status is DampingStatus.CRITICAL:
            state = self._test(state, 4, ratio, 2.0 * _RATIO, "a pole outside the unit circle", found)
        clipped = max(-3.0, min(3.0, off / max(state.spread.deviation, 0.02))) * max(state.spread.deviation, 0.02)
        return state._replace(ratio=state.ratio + clipped / _MEMORY, spread=track(state.spread, off, _MEMORY))

    def _regime(self, state: DynamicsState, z: float, found: list[Evidence]) -> DynamicsState:
        regime = self._regimes.step(state.regime or self._regimes.init(), z)
        odds = float(regime.log_probabilities[1:].max()) / math.log(10.0)
        nominal = float(regime.log_probabilities[0]) / math.log(10.0)
        # One against a million odds of health is what counts.
        state = state._replace(regime=regime)
        return self._test(state, 5, float(regime.probabilities[0]), max(odds - nominal, 0.0) / 6.0, "nominal", found)

    def _test(
        self, state: DynamicsState, index: int, value: float, score: float, unit: str, found: list[Evidence]
    ) -> DynamicsState:
        test = self._tests[index]
        if math.isnan(score):
            return state
        tail, fired = test.step(state.tails[index], Innovation(test.channel, score, 1.0))
        if fired is not None:
            allowed = test.threshold(state.tails[index])
            message = f"{test.channel}: {value:.3g} {unit}, score {score:.1f}; {allowed:.1f} are allowed"
            found.append(Evidence(test.channel, value, True, Guarantee.HEURISTIC, message))
        if tail is state.tails[index]:
            return state
        return state._replace(tails=(*state.tails[:index], tail, *state.tails[index + 1 :]))


def _surprise(p_value: float) -> float:
    return -math.log(max(p_value, 1e-300))


def _rank(columns: FloatArray) -> float:
    """Number of independent columns of equal weight that have the same covariance's first two moments."""
    covariance = columns.T @ columns
    square = float((covariance * covariance).sum())
    return float(np.trace(covariance)) ** 2 / square if square > 0.0 else 1.0
