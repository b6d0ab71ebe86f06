"""The loop for those who have none of their own in the test: a factory of model, data, loss and optimizer is enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kalmanguard.stress.loading import made
from kalmanguard.stress.subject import materialised, training_loss
from kalmanguard.testing.trial import Trial

_MOST_BATCHES = 64


def standard_loop(factory: Callable[[int], Any]) -> Callable[[Trial], None]:
    """Make a training function of a factory: forward pass, backward pass, step.

    Parameters
    ----------
    factory
        ``factory(seed)`` that returns ``(model, batches, loss_fn, optimizer)``, with a list of batches of which the
        last third is held out; or a plant. Without an optimizer AdamW at 1e-3 is used.

    Raises
    ------
    ConfigurationError
        When the training starts: the factory returned something else.

    Examples
    --------
    >>> def make(seed):
    ...     x = torch.randn(192, 4)
    ...     data = [(part, part.sum(1, keepdim=True)) for part in x.split(16)]
    ...     model = torch.nn.Linear(4, 1)
    ...     return model, data, torch.nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1)
    >>> from kalmanguard.testing import assert_stable
    >>> result = assert_stable(standard_loop(make), steps=40, seeds=1)
    >>> result.last[0] < 0.1 * result.first[0]
    True
    """

    def train(trial: Trial) -> None:
        loaded = made(factory(trial.seed))
        model = loaded.model
        optimizer = loaded.optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
        batches, held_out = loaded.batches or [], loaded.held_out
        if held_out is None:
            device = next(model.parameters()).device
            batches, held_out = materialised(_few(batches), None, device)
        supervisor = trial.supervise(model, held_out, optimizer=optimizer, loss_fn=loaded.loss_fn)
        model.train()
        for batch in trial.batches(batches):
            loss = training_loss(model, batch, loaded.loss_fn)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            supervisor.update(loss)

    return train


def _few(batches: Any) -> list[Any]:
    """The first batches: a loader may be endless."""
    return [batch for batch, _ in zip(batches, range(_MOST_BATCHES), strict=False)]
