"""Curves of any length in bounded memory: buckets keep their least, greatest and mean value, and double in width."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kalmanguard.records import FloatArray

#: Steps of values that are not finite which are listed one by one; all of them are counted.
_LISTED = 200


class Curve(NamedTuple):
    """A decimated series: per bucket its first step, and the least, greatest and mean of its finite values.

    ``first``, ``last`` and ``best`` (the least) are single values, ``finite`` how many were so, ``lost`` the steps
    of those that were not (the first 200), ``lost_count`` how many these were, ``ends_lost`` whether the last was so.
    """

    steps: FloatArray
    low: FloatArray
    high: FloatArray
    mean: FloatArray
    first: float
    last: float
    best: float
    best_step: float
    finite: int
    lost: tuple[float, ...]
    lost_count: int
    ends_lost: bool

    def __bool__(self) -> bool:
        return self.finite + self.lost_count > 0


class Decimator:
    """Takes in a series value by value and keeps at most ``2 * buckets`` buckets of it.

    Parameters
    ----------
    buckets
        A picture's width in pixels is enough: least and greatest value of every bucket are kept, so no spike is lost.

    Notes
    -----
    Buckets hold equally many values; when there are too many, neighbours are merged and the width doubles. Memory does
    not depend on the length of the series. Guarantee: EXACT for least, greatest and count; the mean to rounding.

    Examples
    --------
    >>> decimator = Decimator(2)
    >>> for step in range(1, 9):
    ...     decimator.add(step, 100.0 if step == 6 else 1.0)
    >>> curve = decimator.curve()
    >>> curve.steps.tolist(), curve.high.tolist(), curve.finite
    ([1.0, 3.0, 5.0, 7.0], [1.0, 1.0, 100.0, 1.0], 8)
    """

    def __init__(self, buckets: int = 500) -> None:
        self._most = 2 * buckets
        self._width = 1
        # First step, least, greatest, sum and number of values of every bucket.
        self._rows: list[list[float]] = []
        self._first = self._last = math.nan
        self._best, self._best_step = math.inf, math.nan
        self._count = 0
        self._lost: list[float] = []
        self._lost_count = 0
        self._ends_lost = False

    def add(self, step: float, value: float) -> None:
        """Take in one value."""
        self._ends_lost = not math.isfinite(value)
        if self._ends_lost:
            self._lost_count += 1
            if len(self._lost) < _LISTED:
                self._lost.append(step)
            return
        if self._count == 0:
            self._first = value
        self._count += 1
        self._last = value
        if value < self._best:
            self._best, self._best_step = value, step
        rows = self._rows
        if rows and rows[-1][4] < self._width:
            row = rows[-1]
            if value < row[1]:
                row[1] = value
            if value > row[2]:
                row[2] = value
            row[3] += value
            row[4] += 1
            return
        if len(rows) >= self._most:
            self._halve()
        self._rows.append([step, value, value, value, 1])

    def _halve(self) -> None:
        pairs = zip(self._rows[::2], self._rows[1::2], strict=True)
        self._rows = [[a[0], min(a[1], b[1]), max(a[2], b[2]), a[3] + b[3], a[4] + b[4]] for a, b in pairs]
        self._width *= 2

    def curve(self) -> Curve:
        """What has been taken in so far."""
        table = np.array(self._rows, dtype=np.float64).reshape(-1, 5)
        mean = table[:, 3] / table[:, 4] if len(table) else table[:, 3]
        return Curve(
            table[:, 0], table[:, 1], table[:, 2], mean, self._first, self._last, self._best, self._best_step,
            self._count, tuple(self._lost), self._lost_count, self._ends_lost,
        )  # fmt: skip
