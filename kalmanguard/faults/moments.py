"""Where optimizers keep their first and second moments."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError

Which = Literal["first", "second", "both"]

_KEYS = {
    "first": ("exp_avg", "momentum_buffer"),
    "second": ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "row_var", "col_var", "variance"),
}


def find_moments(model: nn.Module, optimizer: Optimizer, which: Which) -> list[tuple[str, Tensor]]:
    """Return the moment tensors with names such as ``layers.0.weight.exp_avg_sq``, in the order of the param groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    keys = _KEYS["first"] + _KEYS["second"] if which == "both" else _KEYS[which]
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key in keys:
                value = state.get(key)
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                    found.append((f"{names.get(id(parameter), 'unnamed')}.{key}", value))
    return found


def require_moments(model: nn.Module, optimizer: Optimizer, which: Which, *, kind: str, fresh: bool) -> None:
    """Refuse an optimizer that does not keep such moments, or has none yet when they are needed.

    Raises
    ------
    ConfigurationError
        Of this optimizer it is known that it never keeps them, or the fault is due before its first step.
    """
    if find_moments(model, optimizer, which):
        return
    promised = _promised(optimizer)
    asked = {"first", "second"} if which == "both" else {which}
    if promised is not None and not asked & promised:
        wanted = "moments" if which == "both" else f"{which} moments"
        raise ConfigurationError(
            f"{kind}: {type(optimizer).__name__} as configured keeps no {wanted}; use another optimizer (AdamW keeps "
            "both, SGD with momentum the first) or another fault."
        )
    if fresh:
        raise ConfigurationError(f"{kind}: before its first step the optimizer has no moments; schedule it later.")


def _promised(optimizer: Optimizer) -> set[str] | None:
    """Which moments the optimizer will keep once it has stepped; ``None`` for classes that are not torch's own."""
    momentum = {"first"} if any(group.get("momentum", 0) for group in optimizer.param_groups) else set()
    if isinstance(optimizer, torch.optim.SGD):
        return momentum
    if isinstance(optimizer, torch.optim.RMSprop):
        return {"second"} | momentum
    if isinstance(optimizer, torch.optim.Adagrad | torch.optim.Adadelta):
        return {"second"}
    if isinstance(optimizer, torch.optim.ASGD | torch.optim.LBFGS | torch.optim.Rprop):
        return set()
    return None
