"""What a process holds of a tensor that is sharded over several (FSDP, tensor parallelism), and where that belongs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kalmanguard.errors import ConfigurationError

#: Types that are never sharded; asking a tensor for what it does not have is slow.
_PLAIN = (Tensor, nn.Parameter)
IntArray = np.ndarray[Any, np.dtype[np.int64]]


class Shard(NamedTuple):
    """A block of a tensor, and its place in the whole.

    Attributes
    ----------
    tensor
        The block in this process's memory; the tensor itself where nothing is sharded.
    whole
        Shape of the whole tensor.
    offset
        First index of the block in each dimension.
    """

    tensor: Tensor
    whole: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def is_part(self) -> bool:
        """Whether other processes hold other blocks."""
        return tuple(self.tensor.shape) != self.whole

    def runs(self) -> tuple[IntArray, int]:
        """Where the block's contiguous runs start among the elements of the whole, in order, and how long each is."""
        shape = tuple(self.tensor.shape)
        if not self.is_part:
            return np.zeros(1, dtype=np.int64), self.tensor.numel()
        # The innermost dimensions that are there from end to end make one run of each row of the next one.
        last = max(d for d in range(len(shape)) if shape[d] != self.whole[d])
        strides = [math.prod(self.whole[d + 1 :]) for d in range(len(shape))]
        starts = np.zeros(1, dtype=np.int64)
        for d in range(last):
            rows = (self.offset[d] + np.arange(shape[d], dtype=np.int64)) * strides[d]
            starts = (starts[:, None] + rows).ravel()
        return starts + self.offset[last] * strides[last], shape[last] * strides[last]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: spread over a mesh of processes."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory; most often the tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # with gradients on, to_local() returns a view that autograd tracks
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one every process must ask for it."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def locals_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """`local` of each, at no cost where none is sharded."""
    return [local(t) for t in tensors] if any(type(t) not in _PLAIN for t in tensors) else tensors


def shard_of(name: str, tensor: Tensor) -> Shard:
    """The block of a parameter that this process holds.

    Raises
    ------
    ConfigurationError
        It is placed in a way that is no block: sums that are still to be added up, for example.
    """
    part = local(tensor)
    if not is_sharded(tensor):
        return Shard(part, tuple(part.shape), (0,) * part.dim())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placed: Any = tensor
    whole = tuple(tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(whole, placed.device_mesh, placed.placements)
    if any(p.is_partial() for p in placed.placements) or (part.numel() and tuple(shape) != tuple(part.shape)):
        raise ConfigurationError(
            f"Parameter {name!r} is placed as {placed.placements} over its mesh; only shards and replicas of "
            "parameters can be supervised."
        )
    return Shard(part, whole, tuple(offset) or (0,) * len(whole))


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether some module of the model is one of FSDP2 (``fully_shard``)."""
    return any(True for _ in _fsdp_modules(model))


def data_mesh(model: nn.Module) -> Tensor | None:
    """The ranks that FSDP2 spreads the model over with this one, each with data of its own; ``None`` if not known."""
    found: list[Tensor] = []
    for module in _fsdp_modules(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        found += [group.mesh_info.mesh.mesh for group in groups if group is not None]
    same = bool(found) and all(torch.equal(mesh, found[0]) for mesh in found)
    return found[0] if same else None


def reshard(model: nn.Module) -> None:
    """Have FSDP2 give up what a forward pass has gathered: without a backward pass it would be used again, stale."""
    for module in _fsdp_modules(model):
        module.reshard()


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "_get_fsdp_state"))
