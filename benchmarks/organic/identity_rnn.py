"""A recurrent network that starts as the identity, without clipping: its gradient explodes through time."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.organic.plant import CPU, Drawn, RegressionPlant
from kalmanguard.models.plant import initialised_with
from kalmanguard.models.stream import Batch, in_batches, seeded

_LENGTH, _HIDDEN, _BATCH = 60, 48, 32


class _IdentityRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.RNN(2, _HIDDEN, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(_HIDDEN, 1)
        with torch.no_grad():
            self.recurrent.weight_hh_l0.copy_(torch.eye(_HIDDEN))
            self.recurrent.weight_ih_l0.normal_(0, 0.001)
            self.recurrent.bias_ih_l0.zero_()
            self.recurrent.bias_hh_l0.zero_()

    def forward(self, sequences: Tensor) -> Tensor:
        """Map sequences ``(B, T, 2)`` to sums ``(B,)``."""
        sums: Tensor = self.head(self.recurrent(sequences)[0][:, -1])[:, 0]
        return sums


def _draw(generator: Generator, count: int) -> Batch:
    """Numbers in [0, 1) with two of them marked, one in either half; the target is the sum of those."""
    numbers = torch.rand(count, _LENGTH, generator=generator)
    first = torch.randint(_LENGTH // 2, (count,), generator=generator)
    second = torch.randint(_LENGTH // 2, _LENGTH, (count,), generator=generator)
    rows = torch.arange(count)
    marks = torch.zeros(count, _LENGTH)
    marks[rows, first] = marks[rows, second] = 1
    return torch.stack([numbers, marks], -1), numbers[rows, first] + numbers[rows, second]


class IdentityRNN(RegressionPlant):
    """The adding task by a rectified recurrent network with identity weights; SGD, no clipping.

    Gradients grow like the largest eigenvalue of the recurrent weights to the power of the length, so a small step
    too far along it is followed by an enormous one. The source clips; this does not.

    References
    ----------
    Le, Jaitly and Hinton, "A simple way to initialize recurrent networks of rectified linear units",
    arXiv:1504.00941, section 4.1; Pascanu, Mikolov and Bengio, ICML 2013 (exploding gradients).
    """

    gauged = "spectral norm of the recurrent weights"

    def __init__(self, *, seed: int, steps: int, lr: float = 0.01, warmup: int = 0) -> None:
        with initialised_with(seed):
            model = _IdentityRNN()
        probe = _draw(seeded(seed, 1), 640)
        held_out = _draw(seeded(seed, 2), 256)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        super().__init__(
            name="identity RNN",
            model=model,
            optimizer=optimizer,
            scheduler=LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup)) if warmup else None,
            loader=Drawn(lambda generator: _draw(generator, _BATCH), seed=seed, batch_size=_BATCH),
            probe_loader=in_batches(*probe, batch_size=128, device=CPU),
            held_out=in_batches(*held_out, batch_size=256, device=CPU),
        )

    def gauge(self) -> float:
        model: _IdentityRNN = self.model  # type: ignore[assignment]
        weights = model.recurrent.weight_hh_l0.detach()
        return float(torch.linalg.matrix_norm(weights, 2)) if bool(weights.isfinite().all()) else float("nan")


class WarmIdentityRNN(IdentityRNN):
    """The same with a linear warm-up over 300 steps to twice the learning rate, which puts the explosion off."""

    def __init__(self, *, seed: int, steps: int) -> None:
        super().__init__(seed=seed, steps=steps, lr=0.02, warmup=300)
