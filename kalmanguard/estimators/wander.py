"""How far a series of readings wanders by itself: the error of readings that come without their examples."""

from __future__ import annotations

import math
from typing import NamedTuple

from kalmanguard.estimators.noise import CLIP, Scale

#: Distances in readings over which a rise may come and go: a memory of up to some thirty readings is seen.
_LAGS = (1, 2, 4, 8, 16, 32)
_MEMORY = 100
#: Variance of the difference of two independent readings over the mean squared height of a bump: in a third of cases
#: the greatest of three normal deviates is the middle one, and then its mean squared distance from the next is
#: 2 - 3 sqrt(3) / (2 pi).
_PER_SQUARED_BUMP = 6.0 / (2.0 - 3.0 * math.sqrt(3.0) / (2.0 * math.pi))
#: The same over the mean squared height above the chord of both neighbours, which half of the readings have.
_PER_SQUARED_KINK = 2.0 / (1.5 / 2.0)


class Wander(NamedTuple):
    """The last readings, newest last, and the scale of differences as kinks show it, and bumps at each distance."""

    recent: tuple[float, ...] = ()
    kinks: Scale = Scale()
    scales: tuple[Scale, ...] = (Scale(),) * len(_LAGS)

    @property
    def deviation(self) -> float:
        """Standard deviation of the difference between two readings, where it is largest."""
        return max(self.kinks.deviation, *(scale.deviation for scale in self.scales))


def wandered(state: Wander, value: float, deviation: float) -> Wander:
    """Learn from one finite reading.

    Parameters
    ----------
    state
        What was learned so far.
    value
        The reading, in loss units.
    deviation
        Standard deviation with which it was predicted: a bump counts as no more than three of these, or of those that
        are usual at its distance.

    Notes
    -----
    A bump is the lesser of a rise and the fall that follows it over the same distance. Neither progress nor harm that
    lasts makes one, so neither counts as noise, fast or slow; what the run has come back from by itself does. Where
    readings fall by more than their noise there are none, and kinks tell it: how far a reading lies above the chord of
    its neighbours, which a fall that slows down never does.
    Assumes that rises and falls are alike. Guarantee: HEURISTIC: each scale is right on average for independent normal
    readings, and for correlated ones at distances beyond their memory; the largest of all, which is used, is too large
    by some ten percent.

    Examples
    --------
    >>> import numpy as np
    >>> noise, falling = Wander(), Wander()
    >>> for n, y in enumerate(np.random.default_rng(0).normal(size=400).tolist()):
    ...     noise, falling = wandered(noise, y, 1.4), wandered(falling, 100.0 - n, 1.4)
    >>> round(noise.deviation / 2**0.5, 1), falling.deviation
    (1.1, 0.0)
    """
    recent = (*state.recent, value)[-2 * _LAGS[-1] - 1 :]
    scales = list(state.scales)
    for i, lag in enumerate(_LAGS):
        if len(recent) <= 2 * lag:
            break
        top = recent[-1 - lag]
        bump = max(0.0, min(top - recent[-1 - 2 * lag], top - value))
        bump = min(bump, CLIP * max(scales[i].deviation, deviation))
        scales[i] = _learned(scales[i], _PER_SQUARED_BUMP * bump * bump)
    kinks = state.kinks
    if len(recent) > 2:
        kink = max(0.0, recent[-2] - (recent[-3] + value) / 2.0)
        kink = min(kink, CLIP * max(kinks.deviation, deviation))
        kinks = _learned(kinks, _PER_SQUARED_KINK * kink * kink)
    return Wander(recent, kinks, tuple(scales))


def _learned(scale: Scale, square: float) -> Scale:
    n = scale.seen + 1
    return Scale(scale.variance + max(1.0 / _MEMORY, 1.0 / n) * (square - scale.variance), n)
