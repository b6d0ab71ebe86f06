"""Faults in the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from kalmanguard.faults.fault import LearningRateFault, require_positive, require_steps

_LARGEST_EXPONENT = 700.0  # of e, within double precision


@final
@dataclass(frozen=True)
class LearningRateSpike(LearningRateFault):
    """The learning rate is ``factor`` times what the schedule says, for ``steps`` steps."""

    kind: ClassVar[str] = "lr_spike"
    factor: float
    steps: int | None = 5

    def __post_init__(self) -> None:
        require_positive("factor", self.factor)
        require_steps(self.steps)

    def factor_at(self, age: int) -> float:
        """Return the factor on the learning rate at the ``age``-th affected step, from 1."""
        return self.factor


@final
@dataclass(frozen=True)
class LearningRateCreep(LearningRateFault):
    """The learning rate grows by ``rate`` with every affected step: ``rate**1``, ``rate**2``, ..."""

    kind: ClassVar[str] = "lr_creep"
    rate: float = 1.03
    steps: int | None = None

    def __post_init__(self) -> None:
        require_positive("rate", self.rate)
        require_steps(self.steps)

    def factor_at(self, age: int) -> float:
        """Return the factor on the learning rate at the ``age``-th affected step, from 1."""
        exponent = age * math.log(self.rate)
        return self.rate**age if exponent < _LARGEST_EXPONENT else math.exp(_LARGEST_EXPONENT)
