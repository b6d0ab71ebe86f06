"""What a model's buffers held when the last step was done, although the forward pass of the next has changed them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, nn

#: Larger buffers (tables of positions, averaged weights) are not copied; nor is any, if the small ones add up to this.
_LARGE_BYTES, _MOST_BYTES = 1 << 18, 1 << 20
_VERSION = attrgetter("_version")


class BufferMemory:
    """Copies of a model's small buffers (BatchNorm statistics and the like), taken at the end of each step.

    Parameters
    ----------
    model
        The supervised model.

    Notes
    -----
    Exact, if what changes a large buffer writes through torch, which raises its version counter; the kernels of
    BatchNorm do not, so small buffers are copied whether they have changed or not. Cost: one small copy a step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._ids = list(map(id, model.buffers()))
        self._large = [b for b in model.buffers() if b.nbytes > _LARGE_BYTES]
        # Through .data, so that putting content back does not look like an edit to autograd.
        self._small = [b.data for b in model.buffers() if b.nbytes <= _LARGE_BYTES]
        if sum(b.nbytes for b in self._small) > _MOST_BYTES:
            self._large, self._small = list(model.buffers()), []
        self._copies: list[Tensor] = []
        self._versions: list[int] | None = None

    def remember(self) -> None:
        """Take the present content for that of the end of the step."""
        self._versions = list(map(_VERSION, self._large))
        if not self._small:
            return
        if not self._copies:
            self._copies = [torch.empty_like(b) for b in self._small]
        torch._foreach_copy_(self._copies, self._small)

    @contextmanager
    def as_remembered(self) -> Iterator[bool]:
        """Put the content of the end of the last step back for a moment; False where it is not known."""
        same = list(map(id, self._model.buffers())) == self._ids
        if not same or list(map(_VERSION, self._large)) != self._versions:
            yield False
            return
        now = [b.clone() for b in self._small]
        if now:
            torch._foreach_copy_(self._small, self._copies)
        try:
            yield True
        finally:
            if now:
                torch._foreach_copy_(self._small, now)
