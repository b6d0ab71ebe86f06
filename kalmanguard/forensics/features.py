"""Rows of a layer's input, taken in its forward pass: a small copy, read when the step is over."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kalmanguard.forensics.hooks import Hook
from kalmanguard.forensics.layers import Layer
from kalmanguard.forensics.samples import Features

_EXAMPLES, _POSITIONS, _ROWS, _UNITS = 16, 4, 64, 512


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
    """At most 64 rows of at most 512 units, evenly spaced with an offset that changes with ``turn``; a copy.

    Examples
    --------
    >>> sampled_rows(torch.zeros(8, 3, 5, 5), 1, 0).shape, sampled_rows(torch.zeros(2, 100, 6), -1, 0).shape
    (torch.Size([64, 3]), torch.Size([64, 6]))
    """
    if axis == 1 and x.dim() > 2:
        x = x.flatten(2)
        x = _every(_every(x, 0, _EXAMPLES, turn), 2, _ROWS // min(_EXAMPLES, len(x)), turn)
        x = x.transpose(1, 2).reshape(-1, x.shape[1])
    else:
        x = _every(x.reshape(-1, x.shape[-1]), 0, _ROWS, turn)
    return _every(x, 1, _UNITS, 0).to(torch.float32, copy=True)


def _every(x: Tensor, dim: int, most: int, turn: int) -> Tensor:
    size = x.shape[dim]
    if size <= most:
        return x
    stride = size // most
    return x.narrow(dim, turn % stride, size - turn % stride)[
        (slice(None),) * dim + (slice(None, None, stride),)
    ].narrow(dim, 0, most)


def _array(rows: Tensor) -> np.ndarray:
    array: np.ndarray = rows.cpu().numpy()
    return array
