"""Dropping a step without reading a number first: a fused optimizer skips it by a flag on its own device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from kalmanguard.sensors.norm import norm_in_place


class Flagged(NamedTuple):
    """A judgement that lies on the device: the norm, and what it was held against."""

    norm: Tensor
    gate: float
    clip: bool


def can_skip(optimizer: Optimizer) -> bool:
    """Whether the optimizer skips a step by ``found_inf`` alone, and leaves all of its state as it was.

    True for the fused optimizers of torch, once they hold state for every parameter (a first step would leave buffers
    behind that were never written), and not under a GradScaler, which sets the flag itself.
    """
    return (
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and type(optimizer).__module__.startswith("torch.optim")
        and getattr(optimizer, "found_inf", None) is None
        and getattr(optimizer, "grad_scale", None) is None
        and all(
            optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        )
    )


def flag(optimizer: Optimizer, gradients: Sequence[Tensor], *, gate: float, clip: bool) -> Flagged:
    """Have the coming step skipped if its gradient is not finite or beyond ``gate``; ``clip`` scales it down instead.

    Nothing waits for the device; `unflag` after the step.
    """
    norm = norm_in_place(gradients)
    wrong = ~torch.isfinite(norm)
    if math.isfinite(gate):
        if clip:
            torch._foreach_mul_(list(gradients), (gate / norm).clamp(max=1.0))
        else:
            wrong |= norm > gate
    optimizer.found_inf = wrong.to(torch.float32)  # type: ignore[attr-defined]
    return Flagged(norm, gate, clip)


def unflag(optimizer: Optimizer) -> None:
    """Take the flag away again: without one, no step is skipped."""
    if hasattr(optimizer, "found_inf"):
        del optimizer.found_inf
