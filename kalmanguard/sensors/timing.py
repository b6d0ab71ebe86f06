"""What steps, probes and sketches cost, and how large a probe and how frequent a sketch the budget allows."""

from __future__ import annotations

import statistics
from typing import NamedTuple

#: Fewest examples that a probe is cut down to, and the interval in steps that its size is fitted to.
_SMALLEST_PROBE, _PROBE_INTERVAL = 32, 100
#: A sketch that is rarer than this shows a jump too late.
_LONGEST_STRIDE = 4
_KEPT = 64


class Fit(NamedTuple):
    """Examples of a probe, and steps from one sketch to the next."""

    probe_examples: int
    stride: int


class Timings:
    """Durations in seconds, the latest of each kind; the first steps are left out where they pay for allocations."""

    def __init__(self) -> None:
        self.steps_s: list[float] = []
        self.probes_s: list[float] = []

    def add_step(self, seconds: float) -> None:
        """One step of the user's, without the supervisor's part."""
        self.steps_s.append(seconds)
        del self.steps_s[:-_KEPT]

    def add_probe(self, seconds: float) -> None:
        """One reading of the probe."""
        self.probes_s.append(seconds)
        del self.probes_s[:-_KEPT]

    def step_s(self) -> float:
        """Median step."""
        return statistics.median(self.steps_s[1:] or self.steps_s)

    def probe_s(self) -> float:
        """Median probe."""
        return statistics.median(self.probes_s)

    def fit(self, *, probe_examples: int, sketch_s: float, budget: float) -> Fit:
        """Cut a probe down, and sketch at every second or fourth step only, where they cost more than half the budget.

        Examples
        --------
        >>> timings = Timings()
        >>> timings.steps_s, timings.probes_s = [0.2, 0.1, 0.1], [0.2]
        >>> timings.fit(probe_examples=128, sketch_s=0.001, budget=0.01)
        Fit(probe_examples=32, stride=2)
        """
        step_s, share = self.step_s(), budget / 2.0
        allowed = int(probe_examples * _PROBE_INTERVAL * share * step_s / min(self.probes_s))
        smallest = min(_SMALLEST_PROBE, probe_examples)
        stride = 1
        while sketch_s / stride > share * step_s and stride < _LONGEST_STRIDE:
            stride *= 2
        return Fit(max(smallest, min(probe_examples, allowed)), stride)
