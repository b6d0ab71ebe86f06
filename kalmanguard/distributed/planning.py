"""Pieces of tensors in the terms of torch.distributed.checkpoint, which plans who writes and who reads what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from kalmanguard.distributed.parts import Part
from kalmanguard.errors import SnapshotError


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A tensor that is written or read, and which part of the whole it is."""

    tensor: Tensor
    part: Part

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The part, as torch.distributed.checkpoint calls it."""
        return ChunkStorageMetadata(torch.Size(self.part.offsets), torch.Size(self.part.sizes))


@final
class PieceSavePlanner(DefaultSavePlanner):
    """Plans to write pieces by name; which rank writes what several hold, and whether all is there, is torch's part."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(name, piece.part.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=piece.chunk,
                    properties=TensorProperties(dtype=piece.tensor.dtype),
                    size=torch.Size(piece.part.shape),
                ),
            )
            for name, piece in self.state_dict.items()
            if not piece.part.nothing
        ]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        tensor: Tensor = self.state_dict[index.fqn].tensor
        return tensor


@final
class PieceLoadPlanner(DefaultLoadPlanner):
    """Plans to fill pieces from whatever parts were written: the resharding is torch's."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, piece in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise SnapshotError(f"The checkpoint does not hold {name}.")
            if piece.tensor.numel():
                found = create_read_items_for_chunk_list(name, stored, [piece.chunk])
                if sum(item.lengths.numel() for item in found) != piece.tensor.numel():
                    raise SnapshotError(f"The checkpoint does not hold all of {name}: its index is damaged.")
                items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        tensor: Tensor = self.state_dict[index.fqn].tensor
        return tensor
