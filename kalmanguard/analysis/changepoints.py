"""Change points of a whole series of normalised innovations, in mean or in mean and variance, by PELT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kalmanguard.analysis.drawing import ORANGE, axes_or_new
from kalmanguard.analysis.segment_cost import SegmentCost
from kalmanguard.analysis.series import series
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.noise import CLIP
from kalmanguard.records import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Of `calibrated_penalty`, by whether the variance may change: constant, per log n, per log of the inverse rate.
_PENALTY = {False: (-1.3, 1.12, 1.9), True: (2.5, 1.05, 2.2)}


class Segment(NamedTuple):
    """Steps from ``start`` to ``end``, both included, with mean and standard deviation of the clipped values."""

    start: int
    end: int
    mean: float
    deviation: float


@dataclass(frozen=True, slots=True, eq=False)
class ChangePoints:
    """Where a series changes.

    Attributes
    ----------
    steps, values
        The rows that hold a value, not clipped, shape ``(n,)``.
    segments
        In order; without a change there is one.
    penalty
        What a change point had to gain in twice the log-likelihood.
    """

    steps: NDArray[np.int64]
    values: FloatArray
    segments: tuple[Segment, ...]
    penalty: float

    @property
    def changes(self) -> list[int]:
        """First step of every segment but the first."""
        return [segment.start for segment in self.segments[1:]]

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the values, and every segment's mean; returns the axes."""
        axes = axes_or_new(axes)
        axes.plot(self.steps, self.values, ".", markersize=2, color="0.6")
        for segment in self.segments:
            axes.plot([segment.start, segment.end], [segment.mean] * 2, color=ORANGE)
        axes.set_xlabel("step")
        return axes

    def __str__(self) -> str:
        return "\n".join(
            f"steps {s.start:,} to {s.end:,}: mean {s.mean:.2f}, standard deviation {s.deviation:.2f}"
            for s in self.segments
        )


def changepoints(
    steps: ArrayLike, values: ArrayLike, *, variance: bool = False, rate: float = 0.05, penalty: float | None = None
) -> ChangePoints:
    """Split a series of normalised innovations where its mean changes, or its mean and variance.

    ``min over segmentations of sum of costs + penalty * number of changes``, exactly, after clipping at 3.

    Parameters
    ----------
    steps
        Whole numbers, strictly increasing, shape ``(n,)``; changes are looked for between rows, whatever their steps.
    values
        Innovations over their standard deviations, shape ``(n,)``; rows with nan are left out.
    variance
        Whether the variance may change too; segments then have at least 5 rows.
    rate
        Chance of any change point in a series that has none, for which the penalty is chosen.
    penalty
        To fix it by hand instead.

    Raises
    ------
    ConfigurationError
        Steps and values are no series or hold fewer than 10 values, the rate is not in (0, 0.5], or the penalty is not
        positive.

    Notes
    -----
    Assumes independent innovations, standard normal while all is well. Clipping bounds what one of them can say, so
    that heavy tails do not become change points; serial correlation does, and a scale that drifts. The segmentation is
    the optimal one (EXACT, pruned dynamic programming). The rate is HEURISTIC: penalties come from
    simulation under the null (`calibrated_penalty`). Cost: n^2 additions at worst, when nothing changes.

    References
    ----------
    Killick, Fearnhead, Eckley, J. American Statistical Association 107 (2012).

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=600)
    >>> z[200:300] += 2.0
    >>> z[450] = 40.0
    >>> print(changepoints(np.arange(600), z))
    steps 0 to 199: mean 0.02, standard deviation 0.96
    steps 200 to 300: mean 1.75, standard deviation 0.91
    steps 301 to 599: mean 0.00, standard deviation 0.97
    """
    if not 0.0 < rate <= 0.5:
        raise ConfigurationError(f"rate = {rate!r} must be above 0 and at most 0.5, such as 0.05.")
    if penalty is not None and not penalty > 0.0:
        raise ConfigurationError(f"penalty = {penalty!r} must be positive, or None to have it chosen by the rate.")
    data = series(steps, values, least=10).known()
    clipped = np.clip(data.values, -CLIP, CLIP)
    shortest = 5 if variance else 1
    price = calibrated_penalty(len(clipped), rate, variance=variance) if penalty is None else float(penalty)
    edges = [*segmentation(SegmentCost(clipped, variance=variance), len(clipped), price, shortest), len(clipped)]
    segments = tuple(
        Segment(
            int(data.steps[a]), int(data.steps[b - 1]), float(clipped[a:b].mean()), float(clipped[a:b].std())
        )
        for a, b in pairwise(edges)
    )  # fmt: skip
    return ChangePoints(data.steps, data.values, segments, price)


def segmentation(cost: SegmentCost, n: int, penalty: float, shortest: int) -> list[int]:
    """First rows of the segments of the cheapest segmentation, segments having at least ``shortest`` rows."""
    best, previous = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
    best[0] = -penalty
    starts = np.zeros(0, dtype=np.int64)
    dropped: list[NDArray[np.int64]] = []
    for end in range(shortest, n + 1):
        if np.isfinite(best[end - shortest]):
            starts = np.append(starts, end - shortest)
        # A start that a change at an earlier end beats is beaten for good, once a segment fits in behind that end.
        if len(dropped) >= shortest:
            starts = np.setdiff1d(starts, dropped.pop(0), assume_unique=True)
        totals = best[starts] + cost(starts, end)
        at = int(totals.argmin())
        best[end], previous[end] = totals[at] + penalty, starts[at]
        dropped.append(starts[totals > best[end]])
    rows = [n]
    while rows[-1] > 0:
        rows.append(int(previous[rows[-1]]))
    return rows[:0:-1]


def calibrated_penalty(n: int, rate: float, *, variance: bool) -> float:
    """Penalty at which a share ``rate`` of series of n standard normal values, clipped, has any change point.

    ``a + b log n + c log(1 / rate)``, fitted to simulations of this very segmentation, n from 30 to 3,000 (1,000 with
    the variance) and rates from 0.01 to 0.1; beyond that extrapolated. ``tests/test_changepoints.py`` simulates again.

    Examples
    --------
    >>> round(calibrated_penalty(1000, 0.05, variance=False), 1)
    12.1
    """
    base, by_length, by_rate = _PENALTY[variance]
    return base + by_length * math.log(n) + by_rate * math.log(1.0 / rate)
