"""What recovery keeps in force over the following optimizer steps, and takes off again exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

_RAMP_STEPS = 20


class LearningRateLimit:
    """Scale the learning rate, and hold it below what the restored state was trained at.

    The user's own value is put back after each step, so that no scheduler undoes or compounds the limit. `release` lets
    the factor grow back to 1, by equal ratios, over 20 steps.
    """

    def __init__(self) -> None:
        self._factor = 1.0
        self._caps: dict[tuple[int, int], float] = {}
        self._users: dict[tuple[int, int], float] = {}
        self._lowest = 1.0
        self._ramp: int | None = None
        self._target = 1.0

    @property
    def active(self) -> bool:
        """Whether any learning rate may be changed at the next step."""
        return self._factor != 1.0 or bool(self._caps) or self._ramp is not None

    def scale(self, factor: float) -> None:
        """Multiply the learning rates by ``factor`` on top of what is in force."""
        self._factor *= factor
        self._ramp = None

    def hold(self, optimizer: Optimizer, rates: tuple[float, ...]) -> None:
        """Let no group's rate exceed the one given for it."""
        self._caps.update({(id(optimizer), index): rate for index, rate in enumerate(rates)})
        self._ramp = None

    def release(self) -> None:
        """Begin to give the user's rates back."""
        if self.active and self._ramp is None:
            self._factor, self._caps, self._ramp = self._lowest, {}, _RAMP_STEPS
            self._target = self._lowest

    def before_step(self, optimizer: Optimizer) -> None:
        """Put the limited rates in force."""
        if not self.active:
            return
        lowest = 1.0
        for index, group in enumerate(optimizer.param_groups):
            key = (id(optimizer), index)
            user = float(group["lr"])
            rate = min(user * self._factor, self._caps.get(key, math.inf))
            if user > 0:
                lowest = min(lowest, rate / user)
            self._users[key] = group["lr"]
            _set_rate(group, rate)
        self._lowest = lowest

    def after_step(self, optimizer: Optimizer) -> None:
        """Put the user's rates back."""
        for index, group in enumerate(optimizer.param_groups):
            user = self._users.pop((id(optimizer), index), None)
            if user is not None:
                _set_rate(group, float(user))
        if self._ramp is not None:
            self._ramp -= 1
            self._factor = self._target ** (self._ramp / _RAMP_STEPS)
            if self._ramp <= 0:
                self._factor, self._ramp = 1.0, None


def _set_rate(group: dict[str, object], rate: float) -> None:
    # A capturable or compiled optimizer holds its rate in a tensor that must be kept.
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class GradientClip:
    """Clip the gradient's norm to a bound for a number of steps."""

    def __init__(self, bound: float, steps: int) -> None:
        self._bound, self._steps = bound, steps

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Scale the gradients down where their norm is above the bound."""
        if self._steps > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self._bound)

    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step."""
        self._steps -= 1


class Anchor:
    """Pull the parameters towards anchored values, weighted by importance: ``g += strength * F * (theta - theta*)``.

    ``F`` is a diagonal importance normalised to mean 1: the optimizer's second moments are a running estimate of the
    diagonal Fisher information of the minibatch loss; where there are none, all weights count the same.

    References
    ----------
    Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 114 (2017), equation 3.
    """

    def __init__(self, anchors: dict[Tensor, tuple[Tensor, Tensor | None]], strength: float, steps: int) -> None:
        self._anchors, self._strength, self._steps = anchors, strength, steps

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Add the pull to the gradients."""
        if self._steps <= 0:
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and not p.grad.is_sparse and p in self._anchors:
                    value, importance = self._anchors[p]
                    pull = p - value if importance is None else (p - value) * importance
                    p.grad.add_(pull, alpha=self._strength)

    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step."""
        self._steps -= 1
