"""A short training of a copy, within the time that there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kalmanguard.stress.budget import Clock
from kalmanguard.stress.subject import Flyer, LossFn, seeded_streams, training_loss


class OutOfTimeError(Exception):
    """The clock ran out after ``steps`` steps of a training; what was begun is left out."""

    def __init__(self, steps: int) -> None:
        super().__init__(f"The time was over after {steps} steps.")
        self.steps = steps


def train(
    flyer: Flyer,
    batches: Sequence[Any],
    loss_fn: LossFn | None,
    *,
    steps: int,
    seed: int,
    clock: Clock,
    factor: float = 1.0,
    clip: float | None = None,
) -> list[float]:
    """Train a copy in place, in training mode and over the batches in a seeded order, at ``factor`` times its rates.

    Returns
    -------
    list of float
        Gradient norms before clipping, one for each step. It ends with the first loss that is not finite, whose norm
        is nan: what follows could only be worse.

    Raises
    ------
    OutOfTimeError
        The clock ran out first.
    """
    model, optimizer = flyer.model, flyer.optimizer
    device = next(model.parameters()).device
    order = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    model.train()
    norms: list[float] = []
    todo: list[int] = []
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    with seeded_streams(device, seed), torch.enable_grad():
        for _ in range(steps):
            if clock.spent:
                raise OutOfTimeError(len(norms))
            todo = todo or torch.randperm(len(batches), generator=order).tolist()
            optimizer.zero_grad()
            loss = training_loss(model, batches[todo.pop()], loss_fn)
            if not math.isfinite(float(loss.detach())):
                norms.append(math.nan)
                break
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad for p in trained if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients))
            norms.append(norm)
            if clip is not None and norm > clip:
                for gradient in gradients:
                    gradient.mul_(clip / norm)
            optimizer.step()
        optimizer.zero_grad()
    return norms
