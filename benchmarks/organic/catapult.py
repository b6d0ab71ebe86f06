"""Catapults: learning rates at which the loss grows by orders of magnitude, and then falls to a flatter minimum."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.organic.plant import CPU, EXAMPLES, RegressionPlant, Whole
from kalmanguard.models.plant import initialised_with
from kalmanguard.models.stream import Batch, in_batches, seeded

_WIDTH = 512
_RATES = (3.0, 2.2, 3.4, 2.6, 3.8)
_CALM_STEPS, _CALM_RATE = 150, 0.05


class _TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(_WIDTH))
        self.v = nn.Parameter(torch.randn(_WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``(B,)`` to ``f x``."""
        return self.u @ self.v / _WIDTH**0.5 * x

    def curvature(self) -> float:
        return float((self.u @ self.u + self.v @ self.v).detach() / _WIDTH)


class Catapult(RegressionPlant):
    """``f = u v / sqrt n`` with loss ``f^2 / 2``, at a learning rate of ``r`` over its curvature, ``2 < r < 4``.

    ``f <- f (1 - r_t + eta^2 f^2 / n)`` grows while ``r_t = eta lambda_t > 2``; but growing, it lowers the curvature,
    ``lambda <- lambda + eta f^2 (r_t - 4) / n``, until ``r_t < 2`` and the loss converges. Seeds take ``r`` = 3.0,
    2.2, 3.4, 2.6, 3.8 in turn.

    References
    ----------
    Lewkowycz, Bahri, Dyer, Sohl-Dickstein and Gur-Ari, "The large learning rate phase of deep learning: the catapult
    mechanism", arXiv:2003.02218, section 2.
    """

    gauged = "learning rate times curvature"

    def __init__(self, *, seed: int, steps: int, calm: bool = False) -> None:
        with initialised_with(seed):
            model = _TwoLayers()
        rate = _RATES[seed % len(_RATES)] / model.curvature()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        factor = _CALM_RATE / _RATES[seed % len(_RATES)]
        scheduler = LambdaLR(optimizer, lambda step: factor if step < _CALM_STEPS else 1.0) if calm else None
        inputs = torch.rand(EXAMPLES, generator=seeded(seed, 1)) + 0.5
        inputs = inputs / inputs.square().mean().sqrt()
        whole = in_batches(inputs, torch.zeros_like(inputs), batch_size=EXAMPLES, device=CPU)
        one = torch.ones(1)
        super().__init__(
            name="catapult",
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            loader=Whole(one, torch.zeros_like(one)),
            probe_loader=whole,
            held_out=whole,
        )

    def step_loss(self, batch: Batch) -> Tensor:
        return super().step_loss(batch) / 2

    def gauge(self) -> float:
        model: _TwoLayers = self.model  # type: ignore[assignment]
        return float(self.optimizer.param_groups[0]["lr"]) * model.curvature()


class LateCatapult(Catapult):
    """The same after 150 calm steps at ``r`` = 0.05, when the schedule raises the learning rate.

    That the catapult comes in the middle of a run is ours; the mechanism is the published one.
    """

    def __init__(self, *, seed: int, steps: int) -> None:
        super().__init__(seed=seed, steps=steps, calm=True)
