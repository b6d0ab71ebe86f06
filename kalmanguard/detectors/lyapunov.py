"""Lyapunov exponent of the trajectory: the rate at which updates grow, per step, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Lyapunov(NamedTuple):
    """Exponent per step, its standard error, and the number of steps it was read from; nan when there are too few."""

    exponent: float
    standard_error: float
    steps: int

    @property
    def interval(self) -> tuple[float, float]:
        """About 95 %."""
        return self.exponent - 2.0 * self.standard_error, self.exponent + 2.0 * self.standard_error


def lyapunov(log_speeds: Sequence[float]) -> Lyapunov:
    """Estimate the finite-time Lyapunov exponent from the logarithms of successive update lengths.

    The slope of ``ln |v_t|`` over the window, by least squares: in a linear system updates grow as ``|z|^t`` with z the
    largest pole, so the slope is ``ln |z|``. Take lengths per unit of learning rate, so that a schedule is no growth.

    Parameters
    ----------
    log_speeds
        ``ln (|v_t| / eta_t)`` of at least 8 steps in a row.

    Notes
    -----
    Guarantee: ASYMPTOTIC; the standard error is Newey and West's, for residuals that remember a few steps. A positive
    exponent is no failure: learning goes fastest near the onset of chaos (arXiv 2506.08523), so it warns and buys a
    probe. It is not the exponent between two neighbouring runs; that is `kalmanguard.sensors.benettin`, which needs a
    second copy of the training. Cost: a few passes over the window, in plain Python.

    References
    ----------
    Newey, West, Econometrica 55 (1987); Benettin et al., Meccanica 15 (1980).

    Examples
    --------
    >>> result = lyapunov([0.05 * t + 0.01 * (-1) ** t for t in range(32)])
    >>> round(result.exponent, 3), result.interval[0] > 0
    (0.05, True)
    """
    n = len(log_speeds)
    if n < 8 or not all(map(math.isfinite, log_speeds)):
        return Lyapunov(math.nan, math.nan, n)
    middle, mean = (n - 1) / 2.0, math.fsum(log_speeds) / n
    times = [t - middle for t in range(n)]
    weight = (n**3 - n) / 12.0
    slope = math.fsum(t * (x - mean) for t, x in zip(times, log_speeds, strict=True)) / weight
    scores = [t * (x - mean - slope * t) for t, x in zip(times, log_speeds, strict=True)]
    bandwidth = math.ceil(n ** (1.0 / 3.0))
    variance = math.fsum(s * s for s in scores)
    for lag in range(1, bandwidth + 1):
        product = math.fsum(a * b for a, b in zip(scores[lag:], scores, strict=False))
        variance += 2.0 * (1.0 - lag / (bandwidth + 1.0)) * product
    return Lyapunov(slope, math.sqrt(max(variance, 0.0) * n / (n - 2)) / weight, n)
