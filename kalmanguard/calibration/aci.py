"""Adaptive conformal inference: a threshold that holds a stated long-run rate of exceedances on any sequence."""

from __future__ import annotations

import math
from typing import NamedTuple, final

import numpy as np

from kalmanguard.calibration.conformal import smallest_rank
from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray

_GAMMA = 0.005


class ACIState(NamedTuple):
    """The working level ``alpha``, which may leave [0, 1] by at most one step, and the steps and exceedances so far."""

    alpha: float
    steps: int = 0
    exceeded: int = 0


class ACIResult(NamedTuple):
    """The threshold that a score was held against, and whether it exceeded it."""

    threshold: float
    exceeded: bool


@final
class AdaptiveConformal:
    """Exceed a conformal threshold at a long-run rate, whatever the scores do.

    ::

        alpha <- alpha + gamma (target - 1{s > q(1 - alpha)})

    with q the conformal quantile of the calibration scores: infinite for ``alpha <= 0``, minus infinity for
    ``alpha >= 1``. ``alpha`` is never clipped, since clipping voids the bound.

    Parameters
    ----------
    scores
        Calibration scores, shape ``(n,)``, without nan.
    target
        Rate of exceedances that is aimed at.
    gamma
        Step size: large values follow a change sooner, small ones are steadier. By default 0.005, but at most half of
        the target: above the target a single exceedance makes the threshold infinite for ``gamma / target`` steps.

    Raises
    ------
    ConfigurationError
        No scores, a nan among them, a target outside (0, 1), or a gamma that is not positive and finite.

    Notes
    -----
    Guarantee: EXACT for the long-run rate on any sequence of scores, chosen by an adversary or not:
    ``|exceeded / T - target| <= (max(alpha_1, 1 - alpha_1) + gamma) / (gamma T)`` (`bound`). It says nothing about a
    single step, and under a lasting fault the threshold follows the fault: what it decides must be capped elsewhere.
    Cost: a few operations on floats.

    References
    ----------
    Gibbs, Candes, "Adaptive conformal inference under distribution shift", NeurIPS 2021, equation 2 and
    proposition 4.1.

    Examples
    --------
    >>> aci = AdaptiveConformal(np.arange(99.0), target=0.1, gamma=0.05)
    >>> state = aci.init()
    >>> for _ in range(1000):  # every score is beyond all that calibration has seen
    ...     state, result = aci.step(state, 1e9)
    >>> abs(state.exceeded / state.steps - 0.1) <= aci.bound(state.steps)
    True
    """

    def __init__(self, scores: FloatArray, *, target: float, gamma: float | None = None) -> None:
        known = np.sort(np.asarray(scores, dtype=np.float64).ravel())
        if known.size == 0 or math.isnan(known[-1]):
            raise ConfigurationError("Calibration scores are needed, at least one and without nan.")
        if not 0.0 < target < 1.0:
            raise ConfigurationError(f"target = {target} is outside (0, 1).")
        gamma = min(_GAMMA, target / 2.0) if gamma is None else gamma
        if not 0.0 < gamma < math.inf:
            raise ConfigurationError(f"gamma = {gamma} is not positive and finite.")
        self._scores: list[float] = known.tolist()
        self.target, self.gamma = target, gamma

    def init(self) -> ACIState:
        """The state before the first score: ``alpha`` is the target."""
        return ACIState(self.target)

    def threshold(self, state: ACIState) -> float:
        """The threshold that the next score is held against."""
        if state.alpha <= 0.0:
            return math.inf
        if state.alpha >= 1.0:
            return -math.inf
        rank = smallest_rank(1.0 - state.alpha, len(self._scores))
        return self._scores[rank - 1] if rank <= len(self._scores) else math.inf

    def step(self, state: ACIState, score: float) -> tuple[ACIState, ACIResult | None]:
        """Hold one score against the threshold; a nan is no score and changes nothing."""
        if math.isnan(score):
            return state, None
        threshold = self.threshold(state)
        # At alpha >= 1 every score counts, minus infinity too: the bound needs it.
        exceeded = score > threshold or state.alpha >= 1.0
        alpha = state.alpha + self.gamma * (self.target - exceeded)
        return ACIState(alpha, state.steps + 1, state.exceeded + exceeded), ACIResult(threshold, exceeded)

    def bound(self, steps: int) -> float:
        """Largest distance of the rate of exceedances after ``steps`` scores from the target, for any scores."""
        if steps < 1:
            raise ConfigurationError(f"steps = {steps}: the bound needs at least one.")
        return (max(self.target, 1.0 - self.target) + self.gamma) / (self.gamma * steps)
