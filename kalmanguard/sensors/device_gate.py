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
        and all(group.get("fused") for group in optimizer.param_groups)
        and getattr(optimizer, "found_inf", None) is None
        and getattr(optimizer, "grad_scale", None) is None
        and all(
            optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        )
    )


def flag(
    optimizer: Optimizer,
    gradients: Sequence[Tensor],
    *,
    gate: float,
    clip: bool,
    clipped_from: float | Tensor | None = None,
) -> tuple[Flagged, Tensor]:
    """Have the coming step skipped if its gradient is not finite or beyond ``gate``; ``clip`` scales it down instead.

    ``clipped_from`` is the gradient's norm before the user clipped it, by which it is judged then. Nothing waits for
    the device; `unflag` with what is returned second, after the step.
    """
    present = norm = norm_in_place(gradients)
    if clipped_from is not None:
        norm = torch.maximum(present, torch.as_tensor(clipped_from, dtype=present.dtype, device=present.device))
    wrong = ~torch.isfinite(norm)
    if math.isfinite(gate):
        if clip:
            torch._foreach_mul_(list(gradients), (gate / present).clamp(max=1.0))
        else:
            wrong |= norm > gate
    set_flag = wrong.to(torch.float32)
    optimizer.found_inf = set_flag  # type: ignore[attr-defined]
    return Flagged(norm, gate, clip), set_flag


def unflag(optimizer: Optimizer, set_flag: Tensor) -> None:
    """Take our flag away again, and nobody else's: with one left behind, steps would go on being skipped."""
    if getattr(optimizer, "found_inf", None) is set_flag:
        del optimizer.found_inf  # type: ignore[attr-defined]
