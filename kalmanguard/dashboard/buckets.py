"""Columns of any length in bounded memory: buckets of steps that keep the least and the greatest value."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from kalmanguard.dashboard.columns import IntArray
from kalmanguard.records import FloatArray


class Stretch(NamedTuple):
    """Buckets of a range of steps.

    ``steps`` holds the first step of every bucket that has a row, ``low`` and ``high`` of shape ``(n, columns)`` the
    least and greatest value (nan: none), ``width`` how many steps a bucket spans.
    """

    steps: IntArray
    low: FloatArray
    high: FloatArray
    width: int


@final
class Buckets:
    """Least and greatest value of every column in buckets of equally many steps.

    When steps come that lie beyond the last bucket, neighbours are merged and the width doubles.

    Parameters
    ----------
    columns
        Number of columns.
    most
        Number of buckets, even; memory is ``16 * most * columns`` bytes and a little.
    width
        Steps in a bucket at first.
    start
        First step of the first bucket; earlier steps are counted to that bucket. ``None``: the first one that comes.

    Notes
    -----
    Guarantee: EXACT; the least and the greatest value of every stretch of buckets are those of its rows.

    Examples
    --------
    >>> buckets = Buckets(1, most=4)
    >>> steps = np.arange(1, 9)
    >>> buckets.add(steps, steps, np.where(steps == 6, 100.0, 1.0)[:, None])
    >>> stretch = buckets.stretch(1, 8, 2)
    >>> stretch.steps.tolist(), stretch.low[:, 0].tolist(), stretch.high[:, 0].tolist(), stretch.width
    ([1, 5], [1.0, 1.0], [1.0, 100.0], 4)
    """

    def __init__(self, columns: int, *, most: int, width: int = 1, start: int | None = None) -> None:
        self.width, self.start, self._most = width, start, most
        self._low = np.empty((0, columns))
        self._high = np.empty((0, columns))
        # Which records lie in a bucket, for a closer look; -1: none.
        self._first = np.empty(0, np.int64)
        self._last = np.empty(0, np.int64)
        self._used = 0

    def add(self, steps: IntArray, seqs: IntArray, values: FloatArray) -> None:
        """Take in rows: their steps, the numbers of their records, and their values; nan counts as none."""
        if not len(steps):
            return
        if not len(self._low):  # not before there is something to keep
            shape = self._most, self._low.shape[1]
            self._low, self._high = np.full(shape, np.nan), np.full(shape, np.nan)
            self._first, self._last = np.full(self._most, -1, np.int64), np.full(self._most, -1, np.int64)
        if self.start is None:
            self.start = int(steps[0])
        offsets = np.maximum(steps - self.start, 0)
        while int(offsets.max()) // self.width >= self._most:
            self._double()
        places = offsets // self.width
        edges = np.concatenate(([0], np.flatnonzero(np.diff(places)) + 1))
        at = places[edges]
        # A bucket can come up twice, in a run that was resumed from an earlier step.
        np.fmin.at(self._low, at, np.fmin.reduceat(values, edges, axis=0))
        np.fmax.at(self._high, at, np.fmax.reduceat(values, edges, axis=0))
        ends = np.append(edges[1:], len(places)) - 1
        fresh = self._first[at] < 0
        self._first[at] = np.where(fresh, seqs[edges], np.minimum(self._first[at], seqs[edges]))
        np.maximum.at(self._last, at, seqs[ends])
        self._used = max(self._used, int(places.max()) + 1)

    def _double(self) -> None:
        half = self._most // 2
        with np.errstate(invalid="ignore"):
            low, high = np.fmin(self._low[::2], self._low[1::2]), np.fmax(self._high[::2], self._high[1::2])
        # Records only grow, so the earlier of two buckets has the first one, unless it has none.
        first = np.where(self._first[::2] >= 0, self._first[::2], self._first[1::2])
        last = np.maximum(self._last[::2], self._last[1::2])
        for array, merged, empty in (
            (self._low, low, np.nan), (self._high, high, np.nan), (self._first, first, -1), (self._last, last, -1),
        ):  # fmt: skip
            array[:half], array[half:] = merged, empty
        self.width *= 2
        self._used = (self._used + 1) // 2

    def within(self, low: int, high: int) -> tuple[int, int]:
        """Range of buckets, first and one past the last, that the steps ``low`` to ``high`` lie in."""
        start = self.start or 0
        first = max(0, (low - start) // self.width)
        return first, max(first, min(self._used, (high - start) // self.width + 1))

    def records(self, low: int, high: int) -> tuple[int, int] | None:
        """First and last record of the buckets that hold the steps ``low`` to ``high``; ``None`` when empty."""
        first, end = self.within(low, high)
        begins, ends = self._first[first:end], self._last[first:end]
        known = begins >= 0
        return (int(begins[known].min()), int(ends[known].max())) if known.any() else None

    def stretch(self, low: int, high: int, points: int) -> Stretch:
        """The steps ``low`` to ``high`` in at most ``points`` buckets, or one more."""
        first, end = self.within(low, high)
        group = max(1, -(-(end - first) // points))
        # Aligned groups, so that a picture does not flicker while the run goes on.
        first -= first % group
        edges = np.arange(first, end, group)
        if not len(edges):
            empty = np.empty((0, self._low.shape[1]))
            return Stretch(np.empty(0, np.int64), empty, empty, self.width * group)
        lows = np.fmin.reduceat(self._low[first:end], edges - first, axis=0)
        highs = np.fmax.reduceat(self._high[first:end], edges - first, axis=0)
        filled = np.maximum.reduceat(self._last[first:end], edges - first) >= 0
        steps = (self.start or 0) + edges * self.width
        return Stretch(steps[filled], lows[filled], highs[filled], self.width * group)
