"""Baird's counterexample: temporal differences, a linear value and another policy's data, together, diverge."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from benchmarks.organic.plant import CPU, EXAMPLES, Drawn, RegressionPlant
from kalmanguard.models.stream import Batch, in_batches

_STATES, _DISCOUNT, _LR, _BATCH = 7, 0.99, 0.01, 16


def _features() -> Tensor:
    """Rows are the features of the states: the first six share the last weight, the seventh doubles it."""
    rows = torch.zeros(_STATES, _STATES + 1)
    rows[:6, :6] = 2 * torch.eye(6)
    rows[:6, 7] = 1
    rows[6, 6], rows[6, 7] = 1, 2
    return rows


class _Value(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        start = torch.ones(_STATES + 1)
        start[6] = 10
        self.weights = nn.Parameter(start)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``(..., 8)`` to values ``(...)``."""
        return features @ self.weights


class Baird(RegressionPlant):
    """Semi-gradient TD(0) with importance sampling on Baird's star; all rewards are 0, so the true value is 0.

    The target policy always goes to the seventh state; the behaviour goes there with probability 1/7 and else to one
    of the other six. The probe's loss is the mean squared error of the value over all states.

    References
    ----------
    Baird, "Residual algorithms: reinforcement learning with function approximation", ICML 1995; weights, features and
    the step size 0.01 as in Sutton and Barto, "Reinforcement Learning", 2nd ed. (2018), section 11.2.
    """

    gauged = "largest weight"

    def __init__(self, *, seed: int, steps: int) -> None:
        model = _Value()
        rows = _features()

        def draw(generator: Generator) -> Batch:
            states = torch.randint(_STATES, (_BATCH,), generator=generator)
            solid = torch.rand(_BATCH, generator=generator) < 1 / _STATES
            dashed = torch.randint(_STATES - 1, (_BATCH,), generator=generator)
            following = torch.where(solid, torch.tensor(_STATES - 1), dashed)
            return torch.stack([rows[states], rows[following]], 1), _STATES * solid.float()

        states = rows[torch.arange(EXAMPLES) % _STATES]
        whole = in_batches(states, torch.zeros(EXAMPLES), batch_size=EXAMPLES, device=CPU)
        super().__init__(
            name="Baird",
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=_LR),
            scheduler=None,
            loader=Drawn(draw, seed=seed, batch_size=_BATCH),
            probe_loader=whole,
            held_out=whole,
        )

    def step_loss(self, batch: Batch) -> Tensor:
        """Half the weighted squared temporal difference, whose target is a constant."""
        transitions, ratios = batch
        values = self.model(transitions)
        target = _DISCOUNT * values[:, 1].detach()
        return (ratios * (values[:, 0] - target) ** 2).mean() / 2

    def gauge(self) -> float:
        return float(next(self.model.parameters()).detach().abs().max())
