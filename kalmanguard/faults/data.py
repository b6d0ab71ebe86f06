"""Faults in the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kalmanguard.errors import ConfigurationError
from kalmanguard.faults.fault import DataFault, require_steps


@final
@dataclass(frozen=True)
class GarbageBatch(DataFault):
    """A batch without meaning: inputs uniform over the range of the real ones, targets shuffled.

    Inputs keep shape, dtype, device and range; whole numbers are drawn from the batch's least to its greatest (random
    tokens). Classes are shuffled over the whole batch, real-valued targets between its examples; negative classes
    (the usual mark of positions to ignore) stay where they are.
    """

    kind: ClassVar[str] = "garbage_batch"
    needs_targets: ClassVar[bool] = False
    steps: int | None = 1

    def __post_init__(self) -> None:
        require_steps(self.steps)

    def corrupt_input(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return uniform noise over the range of ``values``."""
        if not values.numel():
            return values
        if values.dtype is torch.bool:
            return torch.randint(2, values.shape, generator=generator).bool().to(values.device)
        low, high = values.amin(), values.amax()
        if values.is_floating_point():
            noise = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device, values.dtype)
            return low + (high - low) * noise
        return torch.randint(int(low), int(high) + 1, values.shape, generator=generator).to(values)

    def corrupt_target(self, values: Tensor, labels: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return the targets in another order."""
        if values.is_floating_point():
            return values[torch.randperm(len(values), generator=generator).to(values.device)]
        valid = values >= 0
        shuffled = values.clone()
        pool = values[valid]
        shuffled[valid] = pool[torch.randperm(len(pool), generator=generator).to(values.device)]
        return shuffled


@final
@dataclass(frozen=True)
class LabelNoise(DataFault):
    """Every target is wrong with probability ``fraction``.

    A class becomes another one, uniform over the others between the least and the greatest seen so far; a
    real-valued target becomes that of a random example of the batch. Negative classes are left alone.
    """

    kind: ClassVar[str] = "label_noise"
    needs_targets: ClassVar[bool] = True
    fraction: float
    steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigurationError(f"fraction = {self.fraction} is outside (0, 1].")
        require_steps(self.steps)

    def corrupt_input(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return the inputs as they are."""
        return values

    def corrupt_target(self, values: Tensor, labels: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return targets of which a fraction is wrong."""
        if values.is_floating_point():
            wrong = torch.rand(len(values), generator=generator) < self.fraction
            source = torch.where(
                wrong, torch.randint(len(values), (len(values),), generator=generator), torch.arange(len(values))
            )
            return values[source.to(values.device)]
        least, greatest = labels
        classes = greatest - least + 1
        if classes < 2:
            return values
        wrong = (torch.rand(values.shape, generator=generator) < self.fraction).to(values.device) & (values >= 0)
        shift = torch.randint(1, classes, values.shape, generator=generator).to(values)
        return torch.where(wrong, (values - least + shift) % classes + least, values)
