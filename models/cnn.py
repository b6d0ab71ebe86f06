"""A small convolutional network on digits, with the two layers that make rollback hard: BatchNorm and dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .digits import as_images, load_digits
from .plant import Plant, initialised_with
from .recipe import OptimizerName, ScheduleName, make_optimizer, make_schedule
from .stream import ShuffledStream, in_batches


class CNN(nn.Module):
    """Three 3 x 3 convolutions with BatchNorm, two poolings, dropout 0.2 and a linear layer."""

    def __init__(self, *, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, width),
            *_block(width, 2 * width),
            nn.MaxPool2d(2),
            *_block(2 * width, 2 * width),
            nn.MaxPool2d(2),
        )
        self.classify = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, 1, 8, 8)`` to logits ``(B, 10)``."""
        logits: Tensor = self.classify(self.features(images))
        return logits


class CNNPlant(Plant):
    """`CNN` on scikit-learn's digits; 15,418 parameters.

    Dropout draws from torch's global generator, like that of any torch model: for bit-identical runs seed it too.

    Parameters
    ----------
    seed
        Of the initial weights and of the order of the data.
    batch_size
        Training examples per step, at least 2 for BatchNorm.
    optimizer
        ``"adamw"`` or ``"sgd"``.
    lr
        Learning rate; by default 2e-3 for AdamW and 0.05 for SGD.
    momentum
        Heavy-ball coefficient of SGD; AdamW ignores it.
    schedule, steps
        Learning-rate schedule (see `make_schedule`) and its length in steps.
    device
        Where the model and all batches live.

    Notes
    -----
    Held-out loss, seeds 0, 1 and 2, from 2.30: AdamW 0.039, 0.036, 0.036 after 400 steps and 0.030, 0.023, 0.006
    after 3,000; SGD 0.032, 0.023, 0.029 and 0.015, 0.019, 0.029. A step takes 3 ms on one core.
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
            as_images(digits.train_inputs), digits.train_targets, seed=seed, batch_size=batch_size, device=place
        )
        with initialised_with(seed):
            model = CNN().to(place)
        lr = lr if lr is not None else 2e-3 if optimizer == "adamw" else 0.05
        trainer = make_optimizer(model.parameters(), optimizer, lr=lr, momentum=momentum)
        super().__init__(
            name="cnn",
            model=model,
            optimizer=trainer,
            scheduler=make_schedule(trainer, schedule, steps=steps),
            loader=loader,
            probe_loader=in_batches(as_images(digits.probe_inputs), digits.probe_targets, batch_size=128, device=place),
            held_out=in_batches(
                as_images(digits.held_out_inputs), digits.held_out_targets, batch_size=512, device=place
            ),
        )

    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return cross_entropy(output, target)


def _block(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
