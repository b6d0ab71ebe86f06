"""Shiryaev-Roberts e-detector: slow upward drift of the training loss, with a stated run length to a false alarm."""

from __future__ import annotations

import math
from typing import NamedTuple

from kalmanguard.estimators.noise import Scale, track
from kalmanguard.records import Evidence, Guarantee

#: Betting rates of the mixture; the detector's value is their mean.
RATES = (0.05, 0.1, 0.2, 0.4)
#: Level of the reference, in standard deviations above the lowest filtered loss; healthy noise lies below on average.
MARGIN = 0.75
_GAIN = 0.05
#: Below this share of the run length the statistic is what healthy training gives.
_SMALL_FRAC = 0.005
_MEMORY = 100
#: Standard deviations of single losses that a fall or a rise must exceed to say anything: the loss of a policy or of a
#: GAN moves within its own noise all the time.
CREDIBLE = 6.0


class DriftState(NamedTuple):
    """Wealth per betting rate, the loss's moving level, the lowest level so far, and the noise scale around it.

    ``risen_for`` counts the steps since the statistic was last small: an estimate of how long ago the drift began.
    """

    wealth: tuple[float, ...] = (0.0,) * len(RATES)
    level: float | None = None
    lowest: float = math.inf
    scale: Scale = Scale()
    risen_for: int = 0


class DriftResult(NamedTuple):
    """The bet ``x``, the statistic after it, whether it alarmed, and whether the wealth was restarted before it."""

    x: float
    statistic: float
    alarm: bool
    reset: bool


class DriftTest:
    """``M <- (1 + lambda x)(M + 1)``, averaged over betting rates lambda; alarm when the mean reaches ``run_length``.

    The bet is ``x = clip((loss - lowest) / sigma - margin, -1, 1)``, with the lowest filtered level and the scale sigma
    known before the loss is seen. After an alarm the reference is the present level, and the wealth starts anew.

    Notes
    -----
    Guarantee: if ``E[x | past] <= 0`` (the loss is on average not more than ``margin`` standard deviations above its
    lowest filtered level), each ``1 + lambda x`` has conditional mean at most 1, the mean of the Shiryaev-Roberts
    processes minus the step count is a supermartingale, and the mean run length to a false alarm is at least
    ``run_length``: EXACT under that null, which real training meets only approximately, so evidence is marked
    HEURISTIC and the rate is audited on healthy runs (``docs/benchmarks.md``). A warm restart or a harder curriculum
    breaks the null without being a fault; the alarm is a suspicion, never a rollback. Cost: 2 us.

    References
    ----------
    Shin, Ramdas, Rinaldo, "E-detectors", arXiv 2203.03532, definition 2.2, theorem 2.4 and section 4.
    """

    def __init__(self, *, run_length: float) -> None:
        self.run_length = run_length

    def step(self, state: DriftState, loss: float) -> tuple[DriftState, DriftResult | None, Evidence | None]:
        """Take in one finite training loss."""
        if state.level is None:
            return state._replace(level=loss), None, None
        deviation = loss - state.level
        known = state.scale.seen >= 20
        result = evidence = None
        wealth, risen_for = state.wealth, 0
        reset = not any(wealth)
        clipped = deviation
        if known:
            sigma = max(state.scale.deviation, 1e-12, 1e-3 * abs(state.lowest))
            if not -3.0 * sigma <= deviation <= 3.0 * sigma:
                clipped = math.copysign(3.0 * sigma, deviation)
            x = (loss - state.lowest) / sigma - MARGIN
            if not -1.0 <= x <= 1.0:
                x = math.copysign(1.0, x)
            wealth = tuple([(1.0 + rate * x) * (m + 1.0) for rate, m in zip(RATES, wealth, strict=True)])
            statistic = sum(wealth) / len(RATES)
            alarm = statistic >= self.run_length
            risen_for = state.risen_for + 1 if statistic >= _SMALL_FRAC * self.run_length else 0
            result = DriftResult(x, statistic, alarm, reset)
            if alarm:
                evidence = Evidence(
                    "drift",
                    statistic,
                    True,
                    Guarantee.HEURISTIC,
                    f"training loss drifts upward from {state.lowest:.4g} to {state.level:.4g}: e-detector "
                    f"{statistic:.3g} >= {self.run_length:.3g}",
                    e_value=statistic,
                )
        level = state.level + _GAIN * clipped
        lowest = min(state.lowest, level) if known else level
        if evidence is not None:
            lowest, wealth = level, (0.0,) * len(RATES)
        return DriftState(wealth, level, lowest, track(state.scale, deviation, _MEMORY), risen_for), result, evidence
