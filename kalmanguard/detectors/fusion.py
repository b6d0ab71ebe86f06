"""Fusion: one e-detector over all channels, which bets that calibrated thresholds are exceeded too often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kalmanguard.records import Evidence, Guarantee

#: Betting rates of the mixture.
RATES = (0.02, 0.05, 0.15)


class FusionState(NamedTuple):
    """Wealth per betting rate."""

    wealth: tuple[float, ...] = (0.0,) * len(RATES)


class FusionTest:
    """``M <- e (M + 1)`` with one e-value e for all channels and levels; alarm when the mean reaches ``run_length``.

    For a channel's innovation z and a threshold q that healthy innovations exceed with probability alpha at most,
    ``1 + lambda (1{z > q} / alpha - 1)`` has mean 1 at most. The e-value of a step is the mean of these over the
    channels that saw something and over the levels: valid whatever the dependence between channels is.

    Parameters
    ----------
    channels
        Names, in the order of the scores that `step` is given.
    thresholds
        For each channel pairs ``(alpha, q)``, from a calibration; channels without any are left out.
    run_length
        Stated mean run length to a false alarm, in steps.

    Notes
    -----
    Guarantee: the mean run length to a false alarm is at least ``run_length`` if, given the past, no channel exceeds
    its threshold with more than its probability: EXACT under that null (simulated in the tests). A calibration holds on
    average over a run, and healthy exceedances come in clusters, so on training it is HEURISTIC. It sees what no
    channel shows by itself: three to seven deviations, again and again.

    References
    ----------
    Shin, Ramdas, Rinaldo, "E-detectors", arXiv 2203.03532; Vovk, Wang, "E-values: calibration, combination and
    applications", Annals of Statistics 49 (2021), for the mean of dependent e-values.

    Examples
    --------
    >>> test = FusionTest(("loss", "gradient"), {"loss": ((0.01, 2.3),), "gradient": ((0.01, 2.7),)}, run_length=1e4)
    >>> state, alarms = FusionState(), []
    >>> for step in range(12):
    ...     state, evidence = test.step(state, (3.0, None if step % 2 else 3.5))
    ...     alarms.append(evidence is not None)
    >>> alarms.index(True)  # at the fourth step in a row
    3
    """

    def __init__(
        self,
        channels: Sequence[str],
        thresholds: Mapping[str, Sequence[tuple[float, float]]],
        *,
        run_length: float,
    ) -> None:
        self._names = tuple(channels)
        self._thresholds = tuple(tuple(thresholds.get(name, ())) for name in channels)
        self.run_length = run_length

    def step(self, state: FusionState, scores: Sequence[float | None]) -> tuple[FusionState, Evidence | None]:
        """Take in one step's normalised innovations; ``None`` where a channel saw nothing."""
        excess = bets = 0.0
        beyond: list[str] = []
        for name, score, levels in zip(self._names, scores, self._thresholds, strict=True):
            if score is None:
                continue
            for alpha, threshold in levels:
                bets += 1.0
                if score > threshold:
                    excess += 1.0 / alpha
                    beyond.append(name)
        if not bets:
            return state, None
        gain = excess / bets - 1.0
        wealth = tuple([(1.0 + rate * gain) * (m + 1.0) for rate, m in zip(RATES, state.wealth, strict=True)])
        statistic = sum(wealth) / len(RATES)
        if statistic < self.run_length:
            return FusionState(wealth), None
        message = (
            f"thresholds are exceeded more often than calibrated, now by {' and '.join(dict.fromkeys(beyond))}: "
            f"e-detector {statistic:.3g} >= {self.run_length:.3g}"
        )
        return FusionState(), Evidence("fusion", statistic, True, Guarantee.HEURISTIC, message, e_value=statistic)
