"""What the scenarios have in common: a plant that fails, or seems to, by its own dynamics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from kalmanguard.models import Plant
from kalmanguard.models.stream import Batch, BatchStream, seeded

#: Examples of a probe set: 128 for a supervisor, 256 for the truth that no guard sees.
EXAMPLES = 384
CPU = torch.device("cpu")


class OrganicPlant(Plant):
    """A plant with one quantity that shows why it fails, or why it only seems to."""

    #: What `gauge` measures.
    gauged: str

    @abstractmethod
    def gauge(self) -> float:
        """Measure it now, without a trace."""


class RegressionPlant(OrganicPlant):
    """One whose loss is the mean squared error."""

    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        return mse_loss(output, target)


class Drawn(BatchStream):
    """Batches that are drawn by a function from a generator of their own."""

    def __init__(self, draw: Callable[[Generator], Batch], *, seed: int, batch_size: int) -> None:
        super().__init__(seed=seed, batch_size=batch_size, device=CPU)
        self._draw = draw

    def batch(self, index: int) -> Batch:
        return self._draw(seeded(self.seed, index))


class Whole(BatchStream):
    """The same batch again and again: full-batch training."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        super().__init__(seed=0, batch_size=len(inputs), device=CPU)
        self._whole = inputs, targets

    def batch(self, index: int) -> Batch:
        return self._whole
