"""Rows of a layer's input, taken in its forward pass: a small copy, read when the step is over."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kalmanguard.forensics.hooks import Hook
from kalmanguard.forensics.layers import Layer
from kalmanguard.forensics.samples import Features

_ROWS, _UNITS = 64, 512
#: Steps of this share of a whole spread over it as evenly as steps can.
_GOLDEN = 0.381966


class FeatureWatch:
    """Watch the inputs of some layers in the next forward pass that is recorded for a backward pass.

    Notes
    -----
    A forward pass without gradients (validation, a probe, the first pass of a checkpointed segment) is not looked at;
    of several in one step the first is. Nothing is kept but copies of at most 64 x 512 numbers, on their own device.
    """

    def __init__(self, failed: Any) -> None:
        self._failed = failed
        self._handles: list[RemovableHandle] = []
        self._taken: dict[str, tuple[Tensor, float]] = {}
        self._turn = 0

    def arm(self, layers: list[Layer]) -> None:
        """Put hooks on these layers."""
        self._turn += 1
        for layer in layers:
            if layer.axis is not None:
                hook = Hook(self._taker(layer), self._failed)
                self._handles.append(layer.module.register_forward_pre_hook(hook))

    def disarm(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def read(self) -> dict[str, Features]:
        """What was taken since, as arrays."""
        taken, self._taken = self._taken, {}
        return {name: Features(_array(rows), largest) for name, (rows, largest) in taken.items()}

    def _taker(self, layer: Layer) -> Any:
        def take(module: Any, inputs: tuple[Any, ...]) -> None:
            if layer.name in self._taken or not torch.is_grad_enabled() or not inputs:
                return
            x, axis = inputs[0], layer.axis
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2 and axis is not None and x.numel():
                rows = sampled_rows(x.detach(), axis, self._turn)
                self._taken[layer.name] = (rows, torch.finfo(x.dtype).max)

        return take


def sampled_rows(x: Tensor, axis: int, turn: int) -> Tensor:
    """At most 64 rows of at most 512 units, scattered over examples and positions, others at every ``turn``; a copy.

    Examples
    --------
    >>> sampled_rows(torch.zeros(8, 3, 5, 5), 1, 0).shape, sampled_rows(torch.zeros(2, 100, 6), -1, 0).shape
    (torch.Size([64, 3]), torch.Size([64, 6]))
    """
    if axis == 1 and x.dim() > 2:
        x = x.flatten(2)
        chosen = _scattered(len(x) * x.shape[2], _ROWS, turn).to(x.device)
        x = x[chosen // x.shape[2], :, chosen % x.shape[2]]
    else:
        x = x.reshape(-1, x.shape[-1])
        x = x.index_select(0, _scattered(len(x), _ROWS, turn).to(x.device))
    return _every(x, 1, _UNITS).to(torch.float32, copy=True)


def _every(x: Tensor, dim: int, most: int) -> Tensor:
    size = x.shape[dim]
    if size <= most:
        return x
    return x[(slice(None),) * dim + (slice(None, None, size // most),)].narrow(dim, 0, most)


def _scattered(size: int, most: int, turn: int) -> Tensor:
    """Indices below ``size``, at most so many: even steps would fall into one column of an image."""
    if size <= most:
        return torch.arange(size)
    step = round(_GOLDEN * size)
    while math.gcd(step, size) > 1:
        step += 1
    return (turn + step * torch.arange(most)) % size


def _array(rows: Tensor) -> np.ndarray:
    array: np.ndarray = rows.cpu().numpy()
    return array
