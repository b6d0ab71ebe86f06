"""The one Kalman recursion of the package: a level and its slope, for a number or for k coordinates at once.

::

    level' = level + reach * slope,   slope' = decay * slope        F = [[1, reach], [0, decay]]
    z      = level + noise                                          H = [1, 0]

A plain trend has ``reach = dt`` and ``decay = 1``.

All variances are in units of the measurement noise variance, which `noise` tracks separately: the gains then depend
on the noise *ratios* alone, and k coordinates with equal ratios share one covariance.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

from kalmanguard.records import FloatArray

X = TypeVar("X", float, FloatArray)
#: Relative change of the gains in one step below which they have settled, and the longest table.
_SETTLED, _LONGEST = 1e-15, 20_000


class Covariance(NamedTuple):
    """Symmetric 2 x 2 covariance of (level, slope), in units of the measurement noise variance."""

    level: float
    cross: float
    slope: float


class Gaussian(NamedTuple, Generic[X]):
    """Mean and covariance of (level, slope)."""

    level: X
    slope: X
    covariance: Covariance


def predict(
    state: Gaussian[X], reach: float, level_noise: float, slope_noise: float, *, decay: float = 1.0
) -> Gaussian[X]:
    """Time update with process noise variances for the level and the slope (already scaled by the time that passes)."""
    p = state.covariance
    return Gaussian(
        state.level + reach * state.slope,
        decay * state.slope,
        Covariance(
            p.level + reach * (2.0 * p.cross + reach * p.slope) + level_noise,
            decay * (p.cross + reach * p.slope),
            decay * decay * p.slope + slope_noise,
        ),
    )


def update(state: Gaussian[X], innovation: X, noise: float = 1.0) -> Gaussian[X]:
    """Measurement update with ``innovation = z - level``, which the caller may have clipped beforehand.

    ``noise`` is the measurement noise variance in the unit of the covariance. For one scalar measurement the short
    form (I - K H) P written out below is symmetric by construction and keeps P positive semi-definite for every
    gain in [0, 1] (Simon, "Optimal State Estimation", 2006, eq. 5.19).
    """
    p = state.covariance
    total = p.level + noise
    gain, slope_gain = p.level / total, p.cross / total
    return Gaussian(
        state.level + gain * innovation,
        state.slope + slope_gain * innovation,
        Covariance((1.0 - gain) * p.level, (1.0 - gain) * p.cross, p.slope - slope_gain * p.cross),
    )


class Gains(NamedTuple):
    """What a filter with constant noise does at one step: spread of the innovation, gains of the level and the slope.

    The spread is the innovation's standard deviation in units of that of the measurement noise.
    """

    spread: float
    level: float
    slope: float


@lru_cache(maxsize=32)
def gains(level_noise: float, slope_noise: float, prior: Covariance) -> tuple[Gains, ...]:
    """The gains at every step of unit length until they have settled; from then on the last ones hold.

    The covariance of a linear filter does not depend on the data, so a filter with constant noise needs no more than
    this table. It is filled by `predict` and `update`.
    """
    state = Gaussian(0.0, 0.0, prior)
    table: list[Gains] = []
    for _ in range(_LONGEST):
        ahead = predict(state, 1.0, level_noise, slope_noise)
        state = update(ahead, 0.0)
        p = ahead.covariance
        total = p.level + 1.0
        new = Gains(math.sqrt(total), p.level / total, p.cross / total)
        if table and all(abs(a - b) <= _SETTLED * abs(a) for a, b in zip(new, table[-1], strict=True)):
            break
        table.append(new)
    return tuple(table)
