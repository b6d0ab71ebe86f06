"""The Dirac-GAN: a generator and a discriminator of one weight each, which circle their equilibrium ever wider."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from benchmarks.organic.plant import CPU, EXAMPLES, RegressionPlant, Whole
from kalmanguard.models.stream import Batch, in_batches, seeded

_LR = 0.2
_START = 0.1


class _Players(nn.Module):
    def __init__(self, angle: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(_START * math.cos(angle)))
        self.psi = nn.Parameter(torch.tensor(_START * math.sin(angle)))

    def forward(self, rows: Tensor) -> Tensor:
        """Project the joint state on directions ``(B, 2)``; the mean square is its squared distance from 0."""
        return rows @ torch.stack([self.theta, self.psi])


class DiracGAN(RegressionPlant):
    """``min_theta max_psi f(theta psi)`` with ``f(t) = -log(1 + e^-t)``, by simultaneous gradient descent and ascent.

    Near the equilibrium 0 a step multiplies ``(theta, psi)`` by a matrix with eigenvalues ``1 +- i h / 2``: at
    ``h = 0.2`` their magnitude is 1.005, a slow spiral outwards that no step shows. The probe's loss is the squared
    distance from the equilibrium, measured in as many directions as there are examples.

    References
    ----------
    Mescheder, Geiger and Nowozin, "Which training methods for GANs do actually converge?", ICML 2018, section 2.
    """

    gauged = "distance from equilibrium"

    def __init__(self, *, seed: int, steps: int) -> None:
        model = _Players(2 * math.pi * float(torch.rand((), generator=seeded(seed, 0))))
        turn = torch.arange(EXAMPLES) * (math.pi * (3 - math.sqrt(5)))  # evenly, in any prefix
        rows = math.sqrt(2) * torch.stack([turn.cos(), turn.sin()], 1)
        whole = in_batches(rows, torch.zeros(EXAMPLES), batch_size=EXAMPLES, device=CPU)
        super().__init__(
            name="dirac GAN",
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=_LR),
            scheduler=None,
            loader=Whole(rows[:1], torch.zeros(1)),
            probe_loader=whole,
            held_out=whole,
        )

    def step_loss(self, batch: Batch) -> Tensor:
        """Loss of the generator, with the gradient of both players."""
        model: _Players = self.model  # type: ignore[assignment]
        generator = -softplus(-model.theta * model.psi.detach())
        discriminator = softplus(-model.theta.detach() * model.psi)
        return generator + discriminator - discriminator.detach()

    def gauge(self) -> float:
        model: _Players = self.model  # type: ignore[assignment]
        return math.hypot(float(model.theta.detach()), float(model.psi.detach()))
