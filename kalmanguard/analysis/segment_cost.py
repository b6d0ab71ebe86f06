"""Cost of a segment: twice the negative Gaussian log-likelihood at its best mean, and at its best variance if asked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kalmanguard.records import FloatArray

#: Smallest standard deviation of a segment, in units of the healthy one: clipped values may all be the same.
_FLOOR = 0.1


class SegmentCost:
    """Cost of the segments of a series from its cumulative sums, constants left out.

    ``sum (z - mean)^2`` with the variance known to be 1, else ``n log v + sum (z - mean)^2 / v`` with v the segment's
    variance, no smaller than a hundredth. Both are maxima of a likelihood, so that a split never costs more than the
    whole: what pruning rests on.

    Parameters
    ----------
    values
        Shape ``(..., n)``; segments run along the last axis.
    variance
        Whether segments have a variance of their own.
    """

    def __init__(self, values: FloatArray, *, variance: bool) -> None:
        start = np.zeros((*values.shape[:-1], 1))
        self._sums = np.concatenate([start, np.cumsum(values, axis=-1)], axis=-1)
        self._squares = np.concatenate([start, np.cumsum(values * values, axis=-1)], axis=-1)
        self._variance = variance

    def __call__(self, start: int | NDArray[np.int64], end: int | NDArray[np.int64]) -> FloatArray:
        """Cost of the rows from ``start`` on and before ``end``, numbers or arrays; of many series, arrays."""
        n = np.asarray(end) - np.asarray(start)
        total = self._sums[..., end] - self._sums[..., start]
        squares = np.maximum(self._squares[..., end] - self._squares[..., start] - total * total / n, 0.0)
        if not self._variance:
            return np.asarray(squares)
        variance = np.maximum(squares / n, _FLOOR**2)
        return np.asarray(n * np.log(variance) + squares / variance)
