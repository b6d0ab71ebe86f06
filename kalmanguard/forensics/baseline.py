"""A layer's own normal: what a quantity was when forensics began to look, followed slowly."""

from __future__ import annotations

import statistics

_MAD = 1.4826


class Baseline:
    """Median and spread of the first values; later ones move it slowly, and an outlier hardly at all.

    Parameters
    ----------
    size
        Values that make the baseline; until then nothing is judged.
    memory
        Values over which it follows the run's own slow change; 0 keeps it for good.
    floor
        Smallest spread, in the quantity's unit.

    Notes
    -----
    A value that lies ``d`` from the level moves it by ``clip(d, +-3 spread) / memory``, so a fault that begins does
    not become normal before ``memory / 3`` values for each spread that it lies off.

    Examples
    --------
    >>> baseline = Baseline(size=3, memory=0)
    >>> [baseline.learn(value) for value in (1.0, 5.0, 2.0)]
    [None, None, None]
    >>> baseline.level, baseline.deviation(9.0)
    (2.0, 7.0)
    """

    __slots__ = ("_first", "_floor", "_memory", "_size", "level", "spread")

    def __init__(self, *, size: int = 5, memory: int = 64, floor: float = 1e-12) -> None:
        self._size, self._memory, self._floor = size, memory, floor
        self._first: list[float] = []
        self.level = self.spread = 0.0

    @property
    def ready(self) -> bool:
        """Whether enough values were seen."""
        return len(self._first) >= self._size

    def deviation(self, value: float) -> float:
        """How far a value lies above the level."""
        return value - self.level

    def learn(self, value: float) -> None:
        """Take in a finite value."""
        if not self.ready:
            self._first.append(value)
            if self.ready:
                self.level = statistics.median(self._first)
                spread = _MAD * statistics.median(abs(v - self.level) for v in self._first)
                self.spread = max(spread, self._floor)
        elif self._memory:
            limit = 3.0 * self.spread
            deviation = min(max(value - self.level, -limit), limit)
            self.level += deviation / self._memory
            self.spread = max(self._floor, self.spread + (abs(deviation) * 1.25 - self.spread) / self._memory)
