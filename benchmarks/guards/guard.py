"""What a guard is to the loop of a benchmark: asked before the optimizer's step, told after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kalmanguard.models import Plant

#: A guard's word or deed: step, kind (suspicion, veto, rollback, halt, clip), the step at whose end the restored state
#: was, the guard's own level where it has one, and a plain sentence.
Event = dict[str, Any]


class Guard:
    """Watches one run; this one lets everything pass.

    The loop asks ``admits`` before the optimizer's step and calls ``after`` behind it.
    """

    def __init__(self, plant: Plant) -> None:
        self.plant = plant
        self.events: list[Event] = []

    def note(self, step: int, kind: str, restored: int | None = None, text: str = "", level: str = "") -> None:
        """Keep one event."""
        self.events.append({"step": step, "kind": kind, "restored": restored, "text": text, "level": level})

    def admits(self, step: int, loss: Tensor) -> bool:
        """Judge the gradient; whether the optimizer shall step."""
        return True

    def after(self, step: int, loss: Tensor) -> bool:
        """Judge the step; whether training shall go on."""
        return True

    def close(self) -> dict[str, Any]:
        """End supervision, and say what there is to say about the whole run."""
        return {}


def gradient_norm(plant: Plant) -> float:
    """Euclidean norm of the whole gradient; nan or infinite where an element is."""
    gradients = [p.grad for p in plant.model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
