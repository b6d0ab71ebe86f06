"""Guards that scale gradients down: at a fixed norm, or at one that follows the run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.guards.guard import Guard, gradient_norm
from kalmanguard.models import Plant


class Clipping(Guard):
    """The usual remedy: gradients clipped to norm 1."""

    def admits(self, step: int, loss: Tensor) -> bool:
        norm = float(torch.nn.utils.clip_grad_norm_(self.plant.model.parameters(), 1.0))
        if norm > 1.0:
            self.note(step, "clip")
        return True


class ZClip(Guard):
    """Clipping at a norm that follows the run's own gradients, by z-score.

    With mean ``m`` and variance ``s^2`` of the norm, both exponential moving averages, a norm ``g`` with
    ``z = (g - m) / s > z*`` is clipped to ``m + s z*^2 / z``; what then enters the averages is the clipped norm.

    Notes
    -----
    From the source: decay 0.97, ``z* = 2.5``, averages that start from the first 25 norms. The later default of its
    repository, a fixed clip at 1.0 on top, is left out: `Clipping` shows that alone. Ours: nothing. A norm that is NaN
    passes and makes the averages NaN, after which nothing is clipped; this is the published rule.

    References
    ----------
    Kumar, Owen, Chowdhury and Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv:2504.02507, and the
    authors' repository bluorion-com/ZClip, ``zclip/zclip.py``.
    """

    _DECAY, _LIMIT, _WARMUP = 0.97, 2.5, 25

    def __init__(self, plant: Plant) -> None:
        super().__init__(plant)
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def admits(self, step: int, loss: Tensor) -> bool:
        norm = gradient_norm(self.plant)
        if len(self._first) < self._WARMUP:
            self._first.append(norm)
            self._mean = sum(self._first) / len(self._first)
            self._variance = sum((g - self._mean) ** 2 for g in self._first) / len(self._first)
            return True
        deviation = math.sqrt(self._variance)
        z = (norm - self._mean) / (deviation + 1e-6)
        if z > self._LIMIT:
            allowed = self._mean + deviation * self._LIMIT**2 / z
            torch.nn.utils.clip_grad_norm_(self.plant.model.parameters(), allowed)
            self.note(step, "clip")
            norm = allowed
        self._mean = self._DECAY * self._mean + (1 - self._DECAY) * norm
        self._variance = self._DECAY * self._variance + (1 - self._DECAY) * (norm - self._mean) ** 2
        return True
