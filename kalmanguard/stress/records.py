"""What a stress test finds: retention curves, weak layers, critical points, recommendations."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

#: Share of what the model has learned that may be lost before a stress counts as harmful; the supervisor's own default.
GIVE_BACK = 0.2


@dataclass(frozen=True, slots=True)
class Curve:
    """How much of what the model has learned is left under one kind of stress.

    Attributes
    ----------
    kind
        Such as ``"weight noise"``.
    levels
        What was applied, from mild to strong.
    retained
        Retained share in [0, 1], one row for each complete seed, one column for each level.
    seeds_wanted
        Seeds that were asked for; fewer rows mean that the time did not suffice.
    """

    kind: str
    levels: tuple[str, ...]
    retained: tuple[tuple[float, ...], ...]
    seeds_wanted: int

    @property
    def scores(self) -> tuple[float, ...]:
        """Mean retained share over the levels, one for each seed."""
        return tuple(math.fsum(row) / len(row) for row in self.retained)

    @property
    def score(self) -> float:
        """Mean of `scores`."""
        return math.fsum(self.scores) / len(self.scores)

    @property
    def standard_error(self) -> float | None:
        """Of `score` over the seeds; ``None`` with one seed."""
        return standard_error(self.scores)

    @property
    def means(self) -> tuple[float, ...]:
        """Mean retained share at each level, over the seeds."""
        return tuple(math.fsum(column) / len(column) for column in zip(*self.retained, strict=True))


@dataclass(frozen=True, slots=True)
class Layer:
    """How sensitive one layer is.

    Attributes
    ----------
    name, parameters
        Of the module that owns the parameters, and how many there are.
    lost, standard_error
        Share of the learned that noise in this layer alone costs, and its error over seeds.
    flips, harmful_flips
        Bit flips that struck it, and those that were harmful.
    importance
        Mean diagonal Fisher information of its parameters; ``None`` where it could not be measured.
    """

    name: str
    parameters: int
    lost: float
    standard_error: float | None
    flips: int = 0
    harmful_flips: int = 0
    importance: float | None = None


@dataclass(frozen=True, slots=True)
class CriticalPoint:
    """A measured point at which the model or its training gives way; ``value`` is ``None`` if none was met."""

    name: str
    value: float | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to do, and the measurement that says so."""

    action: str
    finding: str


@dataclass(slots=True)
class Findings:
    """What one kind of stress has shown."""

    curve: Curve | None = None
    layers: list[Layer] = field(default_factory=list)
    points: list[CriticalPoint] = field(default_factory=list)
    recommendations: list[Recommendation] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def standard_error(values: tuple[float, ...] | list[float]) -> float | None:
    """Of the mean of independent values; ``None`` of fewer than two.

    >>> standard_error([1.0, 3.0])
    1.0
    """
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def crossing(levels: list[float], retained: list[float], threshold: float) -> float | None:
    """Level at which the retained share first falls to ``threshold``, between levels linearly in the logarithm.

    >>> round(crossing([0.1, 1.0], [1.0, 0.0], 0.5), 3)
    0.316
    >>> crossing([0.1, 1.0], [1.0, 0.9], 0.5)
    """
    before: tuple[float, float] | None = None
    for level, value in zip(levels, retained, strict=True):
        if value <= threshold:
            if before is None:
                return level
            share = (before[1] - threshold) / (before[1] - value)
            return math.exp(math.log(before[0]) + share * (math.log(level) - math.log(before[0])))
        before = level, value
    return None
