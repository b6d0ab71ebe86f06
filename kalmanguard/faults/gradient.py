"""Faults in the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kalmanguard.faults.fault import GradientFault, require_pattern, require_positive, require_steps


@final
@dataclass(frozen=True)
class NaNGradient(GradientFault):
    """Every element of every matching gradient is nan, as after an invalid operation in the forward pass."""

    kind: ClassVar[str] = "nan_gradient"
    steps: int | None = 1
    match: str | None = None

    def __post_init__(self) -> None:
        require_steps(self.steps)
        require_pattern(self.match)

    def corrupt(self, gradient: Tensor) -> Tensor:
        """Return nan everywhere."""
        return torch.full_like(gradient, math.nan)


@final
@dataclass(frozen=True)
class InfGradient(GradientFault):
    """Every element of every matching gradient is infinite, as after an overflow."""

    kind: ClassVar[str] = "inf_gradient"
    steps: int | None = 1
    match: str | None = None

    def __post_init__(self) -> None:
        require_steps(self.steps)
        require_pattern(self.match)

    def corrupt(self, gradient: Tensor) -> Tensor:
        """Return infinity everywhere."""
        return torch.full_like(gradient, math.inf)


@final
@dataclass(frozen=True)
class GradientScale(GradientFault):
    """Every matching gradient is multiplied by ``factor``: an explosion (1000) or a vanishing (1e-3)."""

    kind: ClassVar[str] = "gradient_scale"
    factor: float
    steps: int | None = 1
    match: str | None = None

    def __post_init__(self) -> None:
        require_positive("factor", self.factor)
        require_steps(self.steps)
        require_pattern(self.match)

    def corrupt(self, gradient: Tensor) -> Tensor:
        """Return the gradient times the factor."""
        return gradient * self.factor
