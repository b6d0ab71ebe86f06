"""The hooks that make one step's gradients faulty as they come out of the backward pass."""

from __future__ import annotations

from functools import partial
from typing import final

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kalmanguard.faults.fault import Details, GradientFault


@final
class GradientTap:
    """Corrupts what one step's ``backward()`` calls accumulate; hooks exist during that step only.

    A gradient scaler may discard the faulty gradients and try the step again with the next batch. The fault is then
    over: that the gradients were cleared after it had acted shows it.
    """

    def __init__(self, fault: GradientFault, model: nn.Module) -> None:
        self.fault = fault
        self._targets = [parameter for _, parameter in fault.targets(model)]
        self._hit: dict[int, nn.Parameter] = {}
        self._over = False
        self._handles: list[RemovableHandle] = []
        for parameter in self._targets:
            corrupt = partial(self._corrupt, parameter)
            self._handles += [
                parameter.register_hook(corrupt),  # type: ignore[no-untyped-call]
                parameter.register_post_accumulate_grad_hook(self._accumulated),  # type: ignore[no-untyped-call]
            ]

    def details(self) -> Details:
        """Say how many parameters' gradients were corrupted, and whether they were discarded before a step."""
        if not self._hit:
            return {"missed": "no matching parameter received a gradient"}
        return {"parameters": len(self._hit), "discarded": self._over}

    def corrupt_now(self) -> None:
        """Corrupt gradients that have been accumulated already."""
        for parameter in self._targets:
            if parameter.grad is not None:
                parameter.grad = self.fault.corrupt(parameter.grad)
                self._hit[id(parameter)] = parameter

    def corrupt_unseen(self) -> None:
        """Corrupt gradients of sharded parameters that came without a backward hook: FSDP2 sets them itself."""
        for parameter in self._targets:
            if parameter.grad is not None and id(parameter) not in self._hit and hasattr(parameter, "to_local"):
                parameter.grad = self.fault.corrupt(parameter.grad)
                self._hit[id(parameter)] = parameter

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _corrupt(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        if id(parameter) in self._hit and all(_cleared(other) for other in self._hit.values()):
            self._over = True
        return None if self._over else self.fault.corrupt(gradient)

    def _accumulated(self, parameter: Tensor) -> None:
        # Noted here and not above: torch.autograd.grad passes there without accumulating anything.
        if not self._over and isinstance(parameter, nn.Parameter):
            self._hit[id(parameter)] = parameter


def _cleared(parameter: nn.Parameter) -> bool:
    return parameter.grad is None or not bool(parameter.grad.any())
