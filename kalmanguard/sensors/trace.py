"""Look at a model without leaving a trace: modes, buffers, random streams and grad mode are as before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def random_streams_kept(device: torch.device) -> Iterator[None]:
    """Restore Python's, numpy's and torch's (CPU and ``device``) random states on exit."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator = torch.get_device_module(device).get_rng_state(device) if device.type not in ("cpu", "meta") else None
    try:
        yield
    finally:
        if accelerator is not None:
            torch.get_device_module(device).set_rng_state(accelerator, device)
        torch.set_rng_state(cpu)
        np.random.set_state(legacy)
        random.setstate(python)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients; each module gets back the training flag that it had."""
    training = [module for module in model.modules() if module.training]
    grad = torch.is_grad_enabled()
    for module in training:
        module.training = False
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        for module in training:
            module.training = True


class BufferGuard:
    """Put back buffers that a model changes even in evaluation mode; models that do not pay nothing after the first."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers: list[Tensor] = list(model.buffers())
        self._needed: bool | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the buffers' values over the block."""
        if self._needed is False:
            yield
            return
        before = [b.detach().clone() for b in self._buffers]
        try:
            yield
        finally:
            changed = any(not torch.equal(b, old) for b, old in zip(self._buffers, before, strict=True))
            if changed:
                with torch.no_grad():
                    torch._foreach_copy_(self._buffers, before)
            # A nan in a buffer never equals itself; that is not a change, and asking again costs little.
            self._needed = changed
