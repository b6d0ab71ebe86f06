"""A time budget that is kept: shared out among the stresses, asked before every unit of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self


class Clock:
    """Time that a stress may take; work is cut into units of one pass through the model, and asks before each.

    Parameters
    ----------
    seconds
        Until the end of this clock.
    now
        Source of time, in seconds.
    """

    def __init__(self, seconds: float, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left, 0 when none are."""
        return max(0.0, self._end - self._now())

    @property
    def spent(self) -> bool:
        """Whether the time is over."""
        return self._now() >= self._end

    def share(self, parts: int) -> Self:
        """A clock with an equal part of what is left; what one part does not need goes to those after it."""
        return type(self)(self.left_s / parts, now=self._now)
