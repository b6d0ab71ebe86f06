"""Memory for slots: one arena per device, on the host page-locked or mapped from a file, cut into tensors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from kalmanguard.errors import SnapshotError

#: Offsets in an arena are multiples of this, so that every dtype is aligned and no cache line is shared.
_ALIGNMENT_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape, memory format and origin of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    nbytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """Describe ``tensor``; a memory format with gaps is described as contiguous."""
        stride = tensor.stride()
        if not is_dense(tensor):
            stride = torch.empty(tensor.shape, device="meta").stride()
        return cls(
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            stride=tuple(stride),
            device=tensor.device,
            nbytes=tensor.numel() * tensor.element_size(),
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """Where slots lie: in host memory, beside their sources (``same_device``), or in files of ``spill``.

    ``pin`` asks for page-locked memory where the sources are on a CUDA device.
    """

    same_device: bool = False
    spill: Path | None = None
    pin: bool = True


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order (channels_last too)."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def allocate(specs: Sequence[Spec], placement: Placement) -> list[Tensor]:
    """Carve one buffer per spec, with its strides, out of one arena per memory.

    Sources on a CUDA device get page-locked host memory, without which copies cannot run beside the computation.

    Raises
    ------
    SnapshotError
        The memory or the disk space is not there.
    """
    offsets: list[int] = []
    totals: dict[tuple[torch.device, bool], int] = {}
    homes: list[tuple[torch.device, bool]] = []
    for spec in specs:
        pinned = spec.device.type == "cuda" and placement.pin and not placement.same_device and placement.spill is None
        home = (spec.device if placement.same_device else torch.device("cpu"), pinned)
        homes.append(home)
        offsets.append(totals.get(home, 0))
        totals[home] = offsets[-1] + -(-spec.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    try:
        arenas = {home: _arena(nbytes, *home, placement.spill) for home, nbytes in totals.items()}
    except (RuntimeError, MemoryError, OSError) as error:
        raise SnapshotError(
            f"A snapshot needs {sum(totals.values()):,} bytes, which could not be allocated ({error}): lower "
            "snapshot_bytes."
        ) from error
    buffers = []
    for spec, home, offset in zip(specs, homes, offsets, strict=True):
        flat = arenas[home][offset : offset + spec.nbytes].view(spec.dtype)
        buffers.append(flat.as_strided(spec.shape, spec.stride))
    return buffers


def _arena(nbytes: int, device: torch.device, pinned: bool, spill: Path | None) -> Tensor:
    if spill is not None and device.type == "cpu" and nbytes > 0:
        return _mapped(nbytes, spill)
    return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)


def _mapped(nbytes: int, folder: Path) -> Tensor:
    """Map a nameless file: the kernel keeps in memory what fits, and the file vanishes with the tensor."""
    descriptor, name = tempfile.mkstemp(prefix="slot-", suffix=".tmp", dir=folder)
    try:
        # Reserved at once: writing through a mapping to a disk that fills up later would kill the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)
        else:
            _fill(descriptor, nbytes)
        return torch.from_file(name, shared=True, size=nbytes, dtype=torch.uint8)
    finally:
        os.close(descriptor)
        os.unlink(name)


def _fill(descriptor: int, nbytes: int) -> None:
    block = bytes(1 << 20)
    while nbytes > 0:
        nbytes -= os.write(descriptor, block[: min(nbytes, len(block))])
