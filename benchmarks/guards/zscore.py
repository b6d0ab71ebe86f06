"""The ten lines that one writes oneself: an outlier in the loss or the gradient norm, and two copies to go back to."""

from __future__ import annotations

import copy
import math
import statistics
from collections import deque
from typing import Any

from torch import Tensor

from benchmarks.guards.guard import Guard, gradient_norm
from kalmanguard.models import Plant


class ZScore(Guard):
    """Roll back when loss or gradient norm lies six deviations above the mean of 50 steps, or is not finite.

    All constants are ours.
    """

    def __init__(self, plant: Plant) -> None:
        super().__init__(plant)
        self._seen: dict[str, deque[float]] = {}
        self._kept: deque[tuple[int, Any]] = deque(maxlen=2)

    def admits(self, step: int, loss: Tensor) -> bool:
        plant = self.plant
        now = self.signals(loss)
        seen = [self._seen.setdefault(name, deque(maxlen=50)) for name in now]
        if self._kept and any(_is_outlier(v, values) for v, values in zip(now.values(), seen, strict=True)):
            back, (weights, moments) = self._kept[0]
            plant.model.load_state_dict(weights)
            for optimizer, state in zip(plant.optimizers, moments, strict=True):
                optimizer.load_state_dict(copy.deepcopy(state))
            self.note(step, "rollback", back)
            return False
        for value, values in zip(now.values(), seen, strict=True):
            values.append(value)
        if step % 20 == 0:
            state = plant.model.state_dict(), [optimizer.state_dict() for optimizer in plant.optimizers]
            self._kept.append((step - 1, copy.deepcopy(state)))
        return True

    def signals(self, loss: Tensor) -> dict[str, float]:
        """What is watched."""
        return {"loss": float(loss.detach()), "gradient norm": gradient_norm(self.plant)}


class LossZScore(ZScore):
    """The same with the training loss alone, which is all that a log file shows."""

    def signals(self, loss: Tensor) -> dict[str, float]:
        return {"loss": float(loss.detach())}


def _is_outlier(value: float, seen: deque[float]) -> bool:
    if not math.isfinite(value):
        return True
    return len(seen) == seen.maxlen and value > statistics.fmean(seen) + 6 * statistics.stdev(seen)
