"""The optimizers and learning-rate schedules that every plant offers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, LRScheduler

from kalmanguard.errors import ConfigurationError

OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["cosine", "warm-restarts", "warmup-cosine"]

_FINAL_FRAC = 0.05  # of the peak learning rate, where a cosine ends and stays
_WARMUP_FRAC = 0.1  # of the schedule's length


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    name: OptimizerName,
    *,
    lr: float,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """Make AdamW (weight decay 0.01, moments that decay by ``betas``) or SGD with heavy-ball momentum (no decay).

    Raises
    ------
    ConfigurationError
        An unknown name, a learning rate that is not positive, or a momentum outside [0, 1).
    """
    if not (lr > 0 and math.isfinite(lr)):
        raise ConfigurationError(f"lr = {lr}: a learning rate is positive and finite.")
    if not 0 <= momentum < 1:
        raise ConfigurationError(f"momentum = {momentum} is outside [0, 1).")
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.01)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    raise ConfigurationError(f"There is no optimizer {name!r} for plants; choose adamw or sgd.")


def make_schedule(optimizer: torch.optim.Optimizer, name: ScheduleName | None, *, steps: int) -> LRScheduler | None:
    """Make a schedule over ``steps`` steps, to be stepped after every optimizer step.

    ``cosine`` falls to 5 % of the peak and stays there; ``warmup-cosine`` rises linearly over the first tenth before
    that; ``warm-restarts`` repeats a full cosine four times.

    Raises
    ------
    ConfigurationError
        An unknown name, or fewer than 10 steps.
    """
    if name is None:
        return None
    if steps < 10:
        raise ConfigurationError(f"steps = {steps}: a schedule needs at least 10 steps.")
    if name == "cosine":
        return LambdaLR(optimizer, lambda step: _cosine(step / steps))
    if name == "warmup-cosine":
        warmup = max(1, round(_WARMUP_FRAC * steps))

        def factor(step: int) -> float:
            return (step + 1) / warmup if step < warmup else _cosine((step - warmup) / (steps - warmup))

        return LambdaLR(optimizer, factor)
    if name == "warm-restarts":
        return CosineAnnealingWarmRestarts(optimizer, T_0=max(1, steps // 4))
    raise ConfigurationError(f"There is no schedule {name!r}; choose cosine, warm-restarts, warmup-cosine or None.")


def _cosine(progress: float) -> float:
    return _FINAL_FRAC + (1 - _FINAL_FRAC) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
