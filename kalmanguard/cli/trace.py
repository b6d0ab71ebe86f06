"""A quantity over the steps of a run in bounded memory: stretches of steps, each with its lowest and highest value."""

from __future__ import annotations

import math

from kalmanguard.cli.story import Point

_CAPACITY = 512  # more than the widest terminal shows


class Trace:
    """Keeps the minimum and the maximum of every stretch of steps; the stretches double when they become too many.

    Attributes
    ----------
    last
        The latest value, ``None`` before the first.
    low, high
        Lowest and highest finite value of all.
    not_finite
        How many values were not finite.

    Notes
    -----
    A value costs constant time, memory is bounded by 512 stretches, and no extreme is ever lost.

    Examples
    --------
    >>> trace = Trace()
    >>> for step in range(100_000):
    ...     trace.add(step, 9.0 if step == 31_415 else 1.0)
    >>> len(trace.highs()) <= 512, trace.high, max(value for _, value in trace.highs())
    (True, 9.0, 9.0)
    """

    def __init__(self) -> None:
        self.last: float | None = None
        self.low, self.high = math.inf, -math.inf
        self.not_finite = 0
        self._width = 1
        #: Per stretch: its last step, lowest finite and highest value; nan as the highest once one was not finite.
        self._stretches: dict[int, list[float]] = {}

    def add(self, step: int, value: float) -> None:
        """Take in a value. Steps may come again, as they do in a run that was resumed."""
        self.last = value
        if math.isfinite(value):
            self.low, self.high = min(self.low, value), max(self.high, value)
            low = value
        else:
            self.not_finite += 1
            low, value = math.inf, math.nan
        self._keep(step // self._width, step, low, value)
        while len(self._stretches) > _CAPACITY:
            self._double()

    def _double(self) -> None:
        finer, self._stretches = self._stretches, {}
        self._width *= 2
        for index, (step, low, high) in finer.items():
            self._keep(index // 2, step, low, high)

    def _keep(self, index: int, step: float, low: float, high: float) -> None:
        known = self._stretches.get(index)
        if known is None:
            self._stretches[index] = [step, low, high]
            return
        known[0] = max(known[0], step)
        if low < known[1]:
            known[1] = low
        # A nan once there stays: no comparison with it is true.
        if not high <= known[2] and known[2] == known[2]:
            known[2] = high

    def highs(self) -> list[Point]:
        """Last step and highest value of every stretch, in order; nan where a value was not finite."""
        return [(step, high) for step, _, high in sorted(self._stretches.values())]

    def lows(self) -> list[Point]:
        """Last step and lowest finite value of every stretch that has one, in order."""
        return [(step, low) for step, low, _ in sorted(self._stretches.values()) if low < math.inf]
