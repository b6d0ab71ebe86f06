"""Frozen tensors, kept once: the shared base copies and the watch that they are still true."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, final

import torch
from torch import Tensor

from kalmanguard.snapshots.arena import is_dense
from kalmanguard.snapshots.slot import Base

#: Elements of each frozen tensor that are compared with the base at every capture.
_SAMPLES: Final = 64
#: A tensor that changed more often than this was never frozen; it is copied into every slot from then on.
_STRIKES: Final = 2


@final
class FrozenStore:
    """Base copies of tensors that do not train, made once and shared by all slots.

    Notes
    -----
    A tensor counts as unchanged while its address and version counter stand still and 64 spread elements equal the
    base. The sample catches what the counter cannot see: ``tensor.data.mul_()``, as target networks are updated. An
    edit of a few elements through ``.data`` escapes it; a restore brings such elements back to their base values.
    After a change the base is made anew, twice; then the tensor is treated like a trained one.
    """

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        self._strikes: dict[int, int] = {}
        self._known: dict[int, Tensor] = {}  # keeps ids from being used again
        self._batches: list[_Batch] | None = None

    def admits(self, tensor: Tensor, local: Tensor) -> bool:
        """Whether ``tensor`` may be kept as a shared base."""
        return (
            not tensor.requires_grad
            and local.numel() >= _SAMPLES
            and is_dense(local)
            and self._strikes.get(id(tensor), 0) <= _STRIKES
        )

    def base(self, tensor: Tensor, local: Tensor) -> Base:
        """Return the base copy of ``tensor``, making it when there is none."""
        record = self._records.get(id(tensor))
        if record is None:
            record = self._records[id(tensor)] = _Record(local)
            self._known[id(tensor)] = tensor
            self._batches = None
        return record.base

    def changed(self) -> bool:
        """Whether any frozen tensor moved; those that did lose their base and get a strike."""
        if not self._records:
            return False
        if self._batches is None:
            self._batches = _batches(self._records.values())
        moved = {key for key, record in self._records.items() if record.touched()}
        if not all([batch.holds() for batch in self._batches]):
            moved |= {key for key, record in self._records.items() if record.differs()}
        for key in moved:
            self._strikes[key] = self._strikes.get(key, 0) + 1
        self._drop(moved)
        return bool(moved)

    def retain(self, tensors: Collection[Tensor]) -> None:
        """Forget the bases of all but these tensors."""
        self._drop(self._records.keys() - {id(tensor) for tensor in tensors})

    def restored(self, bases: Collection[Base]) -> bool:
        """Accept that these bases were written back; whether no other frozen tensor was written to."""
        written = {id(base) for base in bases}
        stale = {key for key, record in self._records.items() if id(record.base) not in written}
        self._drop(stale)
        for record in self._records.values():
            record.version = record.local._version
        return not stale

    @property
    def nbytes(self) -> int:
        """Bytes of the present bases."""
        return sum(record.base.tensor.nbytes for record in self._records.values())

    def _drop(self, keys: Collection[int]) -> None:
        for key in keys:
            del self._records[key]
        if keys:
            self._batches = None


class _Record:
    """One frozen tensor with what it is watched by."""

    __slots__ = ("base", "local", "pointer", "reference", "sample", "version")

    def __init__(self, local: Tensor) -> None:
        self.local = local
        self.version = local._version
        self.pointer = local.data_ptr()
        self.base = Base(local.detach().to("cpu", copy=True))
        self.sample = local.detach().as_strided((_SAMPLES,), (local.numel() // _SAMPLES,))
        self.reference = self.sample.clone()

    def touched(self) -> bool:
        return self.local._version != self.version or self.local.data_ptr() != self.pointer

    def differs(self) -> bool:
        return not torch.equal(self.sample, self.reference)


class _Batch:
    """The samples of all records of one device and dtype, compared in one go: one host sync instead of hundreds."""

    def __init__(self, records: list[_Record]) -> None:
        self.samples = [record.sample for record in records]
        self.reference = torch.cat([record.reference for record in records])
        self.scratch = torch.empty_like(self.reference)
        self.parts = list(torch.split(self.scratch, _SAMPLES))

    def holds(self) -> bool:
        torch._foreach_copy_(self.parts, self.samples)
        return torch.equal(self.scratch, self.reference)


def _batches(records: Collection[_Record]) -> list[_Batch]:
    groups: dict[tuple[torch.device, torch.dtype], list[_Record]] = {}
    for record in records:
        groups.setdefault((record.local.device, record.local.dtype), []).append(record)
    return [_Batch(group) for group in groups.values()]
