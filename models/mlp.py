"""A small multilayer perceptron on digits: the fastest real plant."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .digits import load_digits
from .plant import Plant, initialised_with
from .recipe import OptimizerName, ScheduleName, make_optimizer, make_schedule
from .stream import ShuffledStream, in_batches


class MLP(nn.Module):
    """64 pixels, two hidden layers of 128 rectified units, 10 logits."""

    def __init__(self, *, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Map rows of 64 standardised pixels ``(B, 64)`` to logits ``(B, 10)``."""
        logits: Tensor = self.layers(pixels)
        return logits


class MLPPlant(Plant):
    """`MLP` on scikit-learn's digits; 26,122 parameters.

    Parameters
    ----------
    seed
        Of the initial weights and of the order of the data.
    batch_size
        Training examples per step.
    optimizer
        ``"adamw"`` or ``"sgd"``.
    lr
        Learning rate; by default 1e-3 for AdamW and 0.1 for SGD.
    momentum
        Heavy-ball coefficient of SGD; AdamW ignores it.
    schedule, steps
        Learning-rate schedule (see `make_schedule`) and its length in steps.
    device
        Where the model and all batches live.

    Notes
    -----
    Held-out loss, seeds 0, 1 and 2, from 2.32: AdamW 0.146, 0.154, 0.155 after 400 steps and 0.135, 0.187, 0.145
    after 3,000; SGD 0.175, 0.169, 0.173 and 0.204, 0.189, 0.189 (it overfits slightly after some 400 steps). A step
    takes 0.4 ms (AdamW) or 0.3 ms (SGD) on one core.

    Examples
    --------
    >>> plant = MLPPlant(seed=0)
    >>> round(plant.held_out_loss(), 1)
    2.3
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        batch_size: int = 64,
        optimizer: OptimizerName = "adamw",
        lr: float | None = None,
        momentum: float = 0.9,
        schedule: ScheduleName | None = None,
        steps: int = 400,
        device: torch.device | str = "cpu",
    ) -> None:
        place = torch.device(device)
        digits = load_digits()
        loader = ShuffledStream(
            digits.train_inputs, digits.train_targets, seed=seed, batch_size=batch_size, device=place
        )
        with initialised_with(seed):
            model = MLP().to(place)
        lr = lr if lr is not None else 1e-3 if optimizer == "adamw" else 0.1
        trainer = make_optimizer(model.parameters(), optimizer, lr=lr, momentum=momentum)
        super().__init__(
            name="mlp",
            model=model,
            optimizer=trainer,
            scheduler=make_schedule(trainer, schedule, steps=steps),
            loader=loader,
            probe_loader=in_batches(digits.probe_inputs, digits.probe_targets, batch_size=128, device=place),
            held_out=in_batches(digits.held_out_inputs, digits.held_out_targets, batch_size=512, device=place),
        )

    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return cross_entropy(output, target)
