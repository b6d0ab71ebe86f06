"""Adaptive noise: the scale of innovations, tracked with clipping so that an outlier does not excuse the next one."""

from __future__ import annotations

import math
from typing import NamedTuple

#: Innovations count at most this many standard deviations; E[min(z^2, 9)] = 0.9973 for a standard normal z.
CLIP = 3.0


class Scale(NamedTuple):
    """Exponentially weighted mean square of innovations, and how many went into it."""

    variance: float = 0.0
    seen: int = 0

    @property
    def deviation(self) -> float:
        """Standard deviation."""
        return math.sqrt(self.variance)


def track(scale: Scale, innovation: float, memory: int) -> Scale:
    """Learn from one innovation: ``v <- v + b (min(nu^2, 9 v) - v)`` with ``b = max(1/memory, 1/n)``.

    The weight 1/n makes the first ``memory`` innovations an ordinary mean, so the start is unbiased (the role of the
    factor d_k in Sage and Husa, "Adaptive filtering with unknown prior statistics", 1969). The first three enter
    unclipped: there is nothing yet to clip by.
    """
    n = scale.seen + 1
    square = innovation * innovation
    if n > 3:
        square = min(square, CLIP * CLIP * scale.variance)
    return Scale(scale.variance + max(1.0 / memory, 1.0 / n) * (square - scale.variance), n)
