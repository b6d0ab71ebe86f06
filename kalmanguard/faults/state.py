"""Faults in the training state: parameters, optimizer moments, BatchNorm statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError
from kalmanguard.faults.fault import Details, StateFault, held, matching, require_pattern, require_positive
from kalmanguard.faults.moments import Which, find_moments, require_moments

Target = Literal["parameter", "moment", "first_moment", "second_moment"]

_MOMENTS: dict[Target, Which] = {"moment": "both", "first_moment": "first", "second_moment": "second"}


@final
@dataclass(frozen=True)
class BitFlip(StateFault):
    """One bit of one element of a parameter or of an optimizer moment flips, as in faulty memory.

    The element is drawn uniformly over all matching tensors, of sharded ones over what this process holds. Bits count
    from 0, the last of the mantissa; ``None`` is the highest bit of the exponent (30 in float32, 14 in float16 and
    bfloat16, 62 in float64).
    """

    kind: ClassVar[str] = "bit_flip"
    target: Target = "parameter"
    bit: int | None = None
    match: str | None = None

    def __post_init__(self) -> None:
        if self.target != "parameter" and self.target not in _MOMENTS:
            raise ConfigurationError(
                f"target = {self.target!r}: choose parameter, moment, first_moment or second_moment."
            )
        if self.bit is not None and not 0 <= self.bit <= 63:
            raise ConfigurationError(f"bit = {self.bit} is outside 0 to 63.")
        require_pattern(self.match)

    def check(self, model: nn.Module, optimizer: Optimizer, *, fresh: bool) -> None:
        """Refuse a model without matching tensors, or with tensors too narrow for the bit."""
        parameters = matching(model, self.match)
        narrow = min(parameters, key=lambda pair: pair[1].element_size())
        if self.bit is not None and self.bit >= 8 * narrow[1].element_size():
            raise ConfigurationError(
                f"bit = {self.bit}: {narrow[0]} is {narrow[1].dtype}, whose bits are 0 to "
                f"{8 * narrow[1].element_size() - 1}; leave bit out for its highest exponent bit."
            )
        if self.target != "parameter":
            require_moments(model, optimizer, _MOMENTS[self.target], kind=self.kind, fresh=fresh)

    def strike(self, model: nn.Module, optimizer: Optimizer, generator: torch.Generator) -> Details:
        """Flip the bit and say which, with the value before and after."""
        candidates = self._candidates(model, optimizer)
        total = sum(tensor.numel() for _, tensor in candidates)
        if not total:
            return {"missed": "the optimizer has no matching moments at this step"}
        name, tensor, place = _locate(candidates, int(torch.randint(total, (1,), generator=generator)))
        bit = 8 * tensor.element_size() - 2 if self.bit is None else self.bit
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape))
        before = tensor[index].item()
        flip_bit(tensor, index, bit)
        return {"tensor": name, "index": list(index), "bit": bit, "before": before, "after": tensor[index].item()}

    def _candidates(self, model: nn.Module, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
        parameters = matching(model, self.match)
        if self.target == "parameter":
            return [(name, held(parameter.detach())) for name, parameter in parameters]
        prefixes = tuple(f"{name}." for name, _ in parameters)
        return [
            (name, held(tensor))
            for name, tensor in find_moments(model, optimizer, _MOMENTS[self.target])
            if name.startswith(prefixes)
        ]


@final
@dataclass(frozen=True)
class MomentsZeroed(StateFault):
    """Optimizer moments become zero while the step counter goes on; without the second, Adam's next step is huge."""

    kind: ClassVar[str] = "moments_zeroed"
    which: Which = "second"

    def __post_init__(self) -> None:
        if self.which not in ("first", "second", "both"):
            raise ConfigurationError(f"which = {self.which!r}: choose first, second or both.")

    def check(self, model: nn.Module, optimizer: Optimizer, *, fresh: bool) -> None:
        """Refuse an optimizer that keeps no such moments."""
        require_moments(model, optimizer, self.which, kind=self.kind, fresh=fresh)

    def strike(self, model: nn.Module, optimizer: Optimizer, generator: torch.Generator) -> Details:
        """Zero them in place."""
        moments = find_moments(model, optimizer, self.which)
        if not moments:
            return {"missed": "the optimizer has no such moments at this step"}
        with torch.no_grad():
            for _, tensor in moments:
                tensor.zero_()
        return {"tensors": len(moments)}


@final
@dataclass(frozen=True)
class MomentsReset(StateFault):
    """The optimizer forgets everything, step counter included, as when a checkpoint is loaded without it."""

    kind: ClassVar[str] = "moments_reset"

    def check(self, model: nn.Module, optimizer: Optimizer, *, fresh: bool) -> None:
        """Refuse an optimizer that keeps no moments, or that makes them only at construction."""
        if isinstance(optimizer, torch.optim.Adagrad):
            raise ConfigurationError(
                f"{self.kind}: Adagrad makes its state at construction and cannot step without; use moments_zeroed."
            )
        require_moments(model, optimizer, "both", kind=self.kind, fresh=fresh)

    def strike(self, model: nn.Module, optimizer: Optimizer, generator: torch.Generator) -> Details:
        """Drop the state of every parameter."""
        count = len(optimizer.state)
        if not count:
            return {"missed": "the optimizer has no state at this step"}
        optimizer.state.clear()
        return {"parameters": count}


@final
@dataclass(frozen=True)
class WeightScale(StateFault):
    """Every matching parameter is multiplied by ``factor``; all parameters without a pattern."""

    kind: ClassVar[str] = "weight_scale"
    factor: float
    match: str | None = None

    def __post_init__(self) -> None:
        require_positive("factor", self.factor)
        require_pattern(self.match)

    def check(self, model: nn.Module, optimizer: Optimizer, *, fresh: bool) -> None:
        """Refuse a model without a matching parameter."""
        matching(model, self.match)

    def strike(self, model: nn.Module, optimizer: Optimizer, generator: torch.Generator) -> Details:
        """Scale them in place."""
        parameters = matching(model, self.match)
        with torch.no_grad():
            for _, parameter in parameters:
                parameter.mul_(self.factor)
        return {"factor": self.factor, "parameters": [name for name, _ in parameters]}


@final
@dataclass(frozen=True)
class BatchNormPoison(StateFault):
    """The running means and variances of every BatchNorm are multiplied by ``factor``.

    It shows in evaluation only: training normalises by the batch, and the statistics heal with their momentum.
    """

    kind: ClassVar[str] = "batchnorm_poison"
    factor: float

    def __post_init__(self) -> None:
        require_positive("factor", self.factor)

    def check(self, model: nn.Module, optimizer: Optimizer, *, fresh: bool) -> None:
        """Refuse a model without running statistics."""
        if not _running_statistics(model):
            raise ConfigurationError(
                f"{self.kind}: {type(model).__name__} has no BatchNorm with running statistics to poison."
            )

    def strike(self, model: nn.Module, optimizer: Optimizer, generator: torch.Generator) -> Details:
        """Scale them in place."""
        statistics = _running_statistics(model)
        with torch.no_grad():
            for tensor in statistics:
                tensor.mul_(self.factor)
        return {"factor": self.factor, "buffers": len(statistics)}


def flip_bit(tensor: Tensor, index: tuple[int, ...], bit: int) -> None:
    """Flip one bit of one element in place, through a view of the same memory as whole numbers.

    Examples
    --------
    >>> weight = torch.tensor([1.5, 2.0])
    >>> flip_bit(weight, (0,), 31)
    >>> weight
    tensor([-1.5000,  2.0000])
    """
    size = tensor.element_size()
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    sign_bit = 8 * size - 1
    mask = -(1 << bit) if bit == sign_bit else 1 << bit
    tensor.detach().view(whole)[index].bitwise_xor_(mask)


def _locate(tensors: list[tuple[str, Tensor]], place: int) -> tuple[str, Tensor, int]:
    for name, tensor in tensors:
        if place < tensor.numel():
            return name, tensor, place
        place -= tensor.numel()
    raise IndexError(place)


def _running_statistics(model: nn.Module) -> list[Tensor]:
    return [
        tensor
        for module in model.modules()
        for tensor in (getattr(module, "running_mean", None), getattr(module, "running_var", None))
        if isinstance(tensor, Tensor)
    ]
