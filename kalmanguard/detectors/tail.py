"""Tail test of one innovation, with a threshold that holds a stated long-run rate whatever the distribution is."""

from __future__ import annotations

import math
from typing import NamedTuple

from kalmanguard.records import Evidence, Guarantee, Innovation

_STEP = 0.5


class TailState(NamedTuple):
    """Logarithm of the threshold over its initial value, never below 0."""

    excess: float = 0.0


class TailTest:
    """Fire when a normalised innovation exceeds a threshold; every firing raises it, quiet steps lower it again.

    ::

        log h <- max(log h_0, log h + eta (1{z > h} - alpha))

    Parameters
    ----------
    channel
        Name of the innovation that is tested.
    threshold
        Initial and smallest threshold ``h_0``, in standard deviations.
    rate
        Long-run rate ``alpha`` of firings per step that is aimed at.
    two_sided
        Whether falls count as much as rises.

    Notes
    -----
    Guarantee: HEURISTIC for a single firing. The number of firings in T steps is at most
    ``alpha T + (ln(H / h_0) + eta) / eta + alpha * (steps spent at the floor)`` for any sequence of innovations bounded
    by H standard deviations, where H is the largest one seen (quantile tracking; the floor only removes firings that a
    lower threshold would have had). So heavy-tailed healthy training buys a few extra probes, then is left alone.
    Cost: 0.5 us.

    References
    ----------
    Angelopoulos, Candes, Tibshirani, "Conformal PID control for time series prediction", NeurIPS 2023, section 2.1.

    Examples
    --------
    >>> test, state = TailTest("loss", threshold=8.0, rate=1e-3), TailState()
    >>> state, evidence = test.step(state, Innovation("loss", 9.0, 1.0))
    >>> evidence.fired, round(test.threshold(state), 1)
    (True, 13.2)
    """

    def __init__(self, channel: str, *, threshold: float, rate: float, two_sided: bool = False) -> None:
        self.channel = channel
        self._threshold, self._rate, self._two_sided = threshold, rate, two_sided

    def threshold(self, state: TailState) -> float:
        """The threshold now in force, in standard deviations."""
        return self._threshold * math.exp(state.excess)

    def step(self, state: TailState, innovation: Innovation) -> tuple[TailState, Evidence | None]:
        """Test one innovation; evidence is returned only when it fires."""
        z = innovation.value / innovation.scale
        size = abs(z) if self._two_sided else z
        if size <= self._threshold and not state.excess:
            return state, None
        threshold = self.threshold(state)
        if size <= threshold:
            return TailState(max(0.0, state.excess - _STEP * self._rate)), None
        message = (
            f"{self.channel} is {innovation.value:+.4g} off its prediction, {size:.1f} standard deviations; "
            f"{threshold:.1f} are allowed"
        )
        p_value = math.erfc(size / math.sqrt(2.0)) / (1 if self._two_sided else 2)
        return TailState(state.excess + _STEP * (1.0 - self._rate)), Evidence(
            self.channel, z, True, Guarantee.HEURISTIC, message, p_value=p_value
        )
