"""What a fault is: when it acts, for how long, and on which of the four places of a training step."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError

Details = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """One thing that the injector did: at which step, of which kind, with the numbers (JSON types only).

    ``details["missed"]`` says why nothing could be done, where that is so.
    """

    step: int
    kind: str
    details: Details


class Fault(ABC):
    """One kind of fault with its numbers; immutable, so that an injector can be used for several runs."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def duration(self) -> int | None:
        """Number of steps that it acts for; ``None`` for all that follow."""

    @abstractmethod
    def check(self, model: nn.Module, optimizer: Optimizer, *, fresh: bool) -> None:
        """Refuse what it cannot act on; ``fresh`` when it is due before the first step of a new optimizer.

        Raises
        ------
        ConfigurationError
            It could not act on this model and optimizer.
        """

    def describe(self) -> str:
        """Its kind and numbers, as in ``lr_spike(factor=50, steps=5)``."""
        numbers = [f"{key}={value}" for key, value in vars(self).items() if value is not None]
        if self.duration is None:
            numbers.append("for good")
        return f"{self.kind}({', '.join(numbers)})"


class GradientFault(Fault):
    """Corrupts gradients as ``backward()`` delivers them, before clipping, hooks and the optimizer see them."""

    match: str | None
    steps: int | None

    @property
    def duration(self) -> int | None:
        """Number of steps that it acts for; ``None`` for all that follow."""
        return self.steps

    def check(self, model: nn.Module, optimizer: Optimizer, *, fresh: bool) -> None:
        """Refuse a model in which no trained parameter matches."""
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in trained for _, p in self.targets(model)):
            raise ConfigurationError(f"{self.kind}: the optimizer holds none of the model's matching parameters.")

    def targets(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return the trainable parameters whose names match."""
        return matching(model, self.match, trainable=True)

    @abstractmethod
    def corrupt(self, gradient: Tensor) -> Tensor:
        """Return the faulty gradient; linear, so that it may act on every part of an accumulated one."""


class LearningRateFault(Fault):
    """Multiplies the learning rate within the optimizer's step, and nowhere else."""

    steps: int | None

    @property
    def duration(self) -> int | None:
        """Number of steps that it acts for; ``None`` for all that follow."""
        return self.steps

    def check(self, model: nn.Module, optimizer: Optimizer, *, fresh: bool) -> None:
        """Refuse an optimizer without learning rates."""
        if not all("lr" in group for group in optimizer.param_groups):
            raise ConfigurationError(f"{self.kind}: {type(optimizer).__name__} has param groups without 'lr'.")

    @abstractmethod
    def factor_at(self, age: int) -> float:
        """Return the factor on the learning rate at the ``age``-th affected step, from 1."""


class DataFault(Fault):
    """Corrupts the batch that `FaultInjector.batches` hands out; must not change a tensor in place."""

    needs_targets: ClassVar[bool]
    steps: int | None

    @property
    def duration(self) -> int | None:
        """Number of steps that it acts for; ``None`` for all that follow."""
        return self.steps

    def check(self, model: nn.Module, optimizer: Optimizer, *, fresh: bool) -> None:
        """Accept every model: batches are known only when they come."""

    @abstractmethod
    def corrupt_input(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return what replaces an input tensor."""

    @abstractmethod
    def corrupt_target(self, values: Tensor, labels: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return what replaces a target tensor; ``labels`` are the least and greatest class seen so far."""


class StateFault(Fault):
    """Strikes the training state once, between the step before and the forward pass of its own."""

    @property
    def duration(self) -> int | None:
        """One step."""
        return 1

    @abstractmethod
    def strike(self, model: nn.Module, optimizer: Optimizer, generator: torch.Generator) -> Details:
        """Do the damage, in place, and say what it was."""


def matching(model: nn.Module, match: str | None, *, trainable: bool = False) -> list[tuple[str, nn.Parameter]]:
    """Return the floating-point parameters whose names contain the regular expression ``match``, all for ``None``.

    Raises
    ------
    ConfigurationError
        There is none.
    """
    found = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and parameter.numel()
        and (parameter.requires_grad or not trainable)
        and (match is None or re.search(match, name))
    ]
    if not found:
        kind = "trainable parameter" if trainable else "parameter"
        where = "" if match is None else f" whose name matches {match!r}"
        names = ", ".join(name for name, _ in model.named_parameters()) or "none at all"
        raise ConfigurationError(f"The model has no {kind}{where}; its parameters are {names}.")
    return found


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is sharded over several, in the same memory; else the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        part: Tensor = to_local()
    return part


def require_pattern(match: str | None) -> None:
    """Refuse what is not a regular expression."""
    if match is not None:
        try:
            re.compile(match)
        except re.error as error:
            raise ConfigurationError(f"match = {match!r} is not a regular expression: {error}.") from None


def require_positive(name: str, value: float) -> None:
    """Refuse a factor or rate that is not positive and finite."""
    if not 0 < value < math.inf:
        raise ConfigurationError(f"{name} = {value}: it must be positive and finite.")


def require_steps(steps: int | None) -> None:
    """Refuse a duration below one step."""
    if steps is not None and not is_count(steps):
        raise ConfigurationError(f"steps = {steps}: a fault lasts a whole number of steps from 1, or None for good.")


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 1 (and not a truth value)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def seeded(*keys: int) -> torch.Generator:
    """Make a generator for these keys, so that no fault's draws depend on another's or touch the global generator."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(keys).generate_state(1)[0]))
