"""The Euclidean norm over all elements of many tensors, at the cost of few calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

#: Tensors below so many elements are copied together, to take one kernel for all of them.
_SMALL = 1 << 15
_REAL = (torch.float32, torch.float64)


def total_norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm over all elements; on an accelerator, reading it waits for the kernels before it."""
    if tensors[0].device.type == "cpu":
        square = _square_on_host(tensors)
        # A square may leave the range of float32 where the norm does not: the slow way decides what is not finite.
        if 0.0 < square < math.inf:
            return math.sqrt(square)
    return float(norm_in_place(tensors))


def norm_in_place(tensors: Sequence[Tensor]) -> Tensor:
    """The same where the first tensor lies: 0-dim, and nothing waits for it."""
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    norms = list(torch._foreach_norm(dense, 2, dtype=_wide(dense)))
    device = norms[0].device
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
    return total


def _square_on_host(tensors: Sequence[Tensor]) -> float:
    """Sum of squares, by a dot product each for large tensors and one for all the small ones; nan where that fails.

    What counts for small models is the number of calls.
    """
    square = 0.0
    try:
        small = []
        for t in tensors:
            if t.numel() < _SMALL:
                small.append(t)
            else:
                flat = t.view(-1)
                square += torch.dot(flat, flat).item() if flat.dtype in _REAL else math.nan
        if small:
            flat = _flatten_dense_tensors(small)  # type: ignore[no-untyped-call]
            square += torch.dot(flat, flat).item() if flat.dtype in _REAL else math.nan
    except RuntimeError:  # sparse, not contiguous, of several devices or dtypes
        return math.nan
    return square


def _wide(dense: Sequence[Tensor]) -> torch.dtype | None:
    """A dtype to accumulate the norms in, where their own would overflow; its own for complex numbers."""
    dtypes = {t.dtype for t in dense}
    if any(dtype.is_complex for dtype in dtypes):
        return None
    if all(t.device.type == "cpu" for t in dense):
        return torch.float64
    return torch.float32 if dtypes & {torch.float16, torch.bfloat16} else None
