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
    the factor grow back to `ceiling`, by equal ratios, over 20 steps of each optimizer.

    Attributes
    ----------
    ceiling
        The factor that is in force when nothing else is: 1, or what has worked where more has failed again.
    """

    def __init__(self) -> None:
        self.ceiling = 1.0
        self._factor = 1.0
        self._caps: dict[tuple[int, int], float] = {}
        self._users: dict[tuple[int, int], float] = {}
        #: Smallest factor that was in force at each optimizer's last step, and steps left of its way back.
        self._lowest: dict[int, float] = {}
        self._left: dict[int, int] = {}
        self._releasing = False

    @property
    def active(self) -> bool:
        """Whether any learning rate may be changed at the next step."""
        return self._factor != 1.0 or bool(self._caps) or self._releasing

    def scale(self, factor: float) -> None:
        """Multiply the learning rates by ``factor`` on top of what is in force."""
        self._interrupt()
        self._factor *= factor

    def hold(self, optimizer: Optimizer, rates: tuple[float, ...]) -> None:
        """Let no group's rate exceed the one given for it."""
        self._interrupt()
        self._caps.update({(id(optimizer), index): rate for index, rate in enumerate(rates)})

    def release(self, *, lasting: bool = False) -> None:
        """Begin to give the user's rates back; ``lasting``: the factor, which has worked, stays, and only caps go."""
        if not self.active or self._releasing:
            return
        if lasting:
            self.ceiling = min(self.ceiling, self._factor)
        self._releasing = True
        self._left = dict.fromkeys(self._lowest, _RAMP_STEPS)
        self._factor, self._caps = self.ceiling, {}
        self._end_if_done()

    def resume(self, ceiling: float) -> None:
        """Take up the ceiling of an earlier run; nothing else is in force."""
        self.ceiling, self._factor, self._caps, self._releasing = ceiling, ceiling, {}, False

    def before_step(self, optimizer: Optimizer) -> None:
        """Put the limited rates in force."""
        if not self.active:
            return
        factor, lowest = self._present_factor(id(optimizer)), 1.0
        for index, group in enumerate(optimizer.param_groups):
            key = (id(optimizer), index)
            user = float(group["lr"])
            rate = min(user * factor, self._caps.get(key, math.inf))
            if user > 0:
                lowest = min(lowest, rate / user)
            self._users[key] = user
            _set_rate(group, rate)
        if not self._releasing:
            self._lowest[id(optimizer)] = lowest

    def after_step(self, optimizer: Optimizer) -> None:
        """Put the user's rates back."""
        for index, group in enumerate(optimizer.param_groups):
            user = self._users.pop((id(optimizer), index), None)
            if user is not None:
                _set_rate(group, user)
        if self._releasing and self._left.get(id(optimizer)):
            self._left[id(optimizer)] -= 1
            self._end_if_done()

    def _present_factor(self, key: int) -> float:
        if not self._releasing:
            return self._factor
        share = self._left.get(key, 0) / _RAMP_STEPS
        between: float = self._lowest.get(key, 1.0) ** share * self.ceiling ** (1.0 - share)
        return between

    def _interrupt(self) -> None:
        """A new limit during a release starts from the lowest factor that the release had reached."""
        if self._releasing:
            self._factor = min(map(self._present_factor, self._left), default=self.ceiling)
            self._releasing = False
        if not self.active:
            self._lowest = {}

    def _end_if_done(self) -> None:
        if not any(self._left.values()):
            self._releasing, self._lowest, self._left = False, {}, {}


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
