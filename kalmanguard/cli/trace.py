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
        #: Per stretch: its last step, lowest and highest value; nan as the highest once a value was not finite.
        self._stretches: dict[int, tuple[int, float, float]] = {}

    def add(self, step: int, value: float) -> None:
        """Take in a value. Steps may come again, as they do in a run that was resumed."""
        self.last = value
        if math.isfinite(value):
            self.low, self.high = min(self.low, value), max(self.high, value)
        else:
            self.not_finite += 1
            value = math.nan
        self._keep(step // self._width, (step, value, value))
        while len(self._stretches) > _CAPACITY:
            self._double()

    def _double(self) -> None:
        finer, self._stretches = self._stretches, {}
        self._width *= 2
        for index, stretch in finer.items():
            self._keep(index // 2, stretch)

    def _keep(self, index: int, stretch: tuple[int, float, float]) -> None:
        if (known := self._stretches.get(index)) is not None:
            highest = max(known[2], stretch[2]) if not math.isnan(known[2] + stretch[2]) else math.nan
            # min() of a number and nan depends on their order.
            lows = [low for low in (known[1], stretch[1]) if not math.isnan(low)]
            stretch = max(known[0], stretch[0]), min(lows, default=math.nan), highest
        self._stretches[index] = stretch

    def highs(self) -> list[Point]:
        """Last step and highest value of every stretch, in order; nan where a value was not finite."""
        return sorted((step, high) for step, _, high in self._stretches.values())

    def lows(self) -> list[Point]:
        """Last step and lowest finite value of every stretch, in order."""
        return sorted((step, low) for step, low, _ in self._stretches.values())
