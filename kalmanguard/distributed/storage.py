"""What torch.distributed.checkpoint plans, written as safetensors and JSON: nothing that is read can run code."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from kalmanguard.distributed.planning import Piece, PieceLoadPlanner
from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.checkpoint import SHARDED_FORMAT, VERSION, check_format
from kalmanguard.snapshots.files import inside, read_json, sync, write_text

#: Where each part of each tensor lies.
INDEX: Final = "index.json"


@final
class ShardWriter(StorageWriter):
    """Writes one safetensors file per rank, and the index of all.

    Parameters
    ----------
    folder
        A folder that all ranks see; rank 0 makes it anew.
    rank
        Of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self.file = f"rank-{rank:05d}.safetensors"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._folder.mkdir()  # before any rank writes: they get their plans after this
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        results = []
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            key = f"{item.index.fqn}@{','.join(map(str, item.index.offset or ()))}"
            tensors[key] = torch.view_as_real(plain) if plain.is_complex() else plain
            results.append(WriteResult(item.index, plain.nbytes, (self.file, key)))
        path = self._folder / self.file
        try:
            save_file(tensors, path)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise SnapshotError(f"{path} could not be written: {error}.") from error
        sync(path)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {(r.index.fqn, r.index.offset): r.storage_data for part in results for r in part}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            chunks = []
            for chunk in stored.chunks:
                file, key = places[name, chunk.offsets]
                chunks.append({"offsets": chunk.offsets, "sizes": chunk.sizes, "file": file, "key": key})
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": stored.size, "chunks": chunks}
        index = {"format": SHARDED_FORMAT, "version": VERSION, "ranks": len(results), "tensors": tensors}
        write_text(self._folder / INDEX, json.dumps(index))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


@final
class ShardReader(StorageReader):
    """Reads the tensors of a sharded checkpoint, also for ``torch.distributed.checkpoint.load``.

    Parameters
    ----------
    folder
        The checkpoint. Its files are not compared with their digests here; `ShardedStore.load` does.

    Raises
    ------
    SnapshotError
        The index is damaged, foreign or newer, or leads out of the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        path = inside(self._folder, INDEX)
        data = read_json(path, "the index of a sharded checkpoint")
        check_format(data, path, SHARDED_FORMAT)
        stored: dict[str, Any] = {}
        self._places: dict[MetadataIndex, tuple[str, str]] = {}
        try:
            self.ranks = int(data["ranks"])
            for name, entry in data["tensors"].items():
                dtype = getattr(torch, entry["dtype"])
                if not isinstance(dtype, torch.dtype):
                    raise TypeError(f"{name} has the type {dtype}")
                chunks = []
                for chunk in entry["chunks"]:
                    box = ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"]))
                    chunks.append(box)
                    self._places[MetadataIndex(name, box.offsets)] = str(chunk["file"]), str(chunk["key"])
                stored[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["shape"]), chunks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SnapshotError(f"{path} is damaged: {type(error).__name__} {error}.") from error
        self._metadata = Metadata(stored)

    @property
    def stored(self) -> Mapping[str, TensorStorageMetadata]:
        """Shape, type and parts of each tensor by name."""
        return self._metadata.state_dict_metadata  # type: ignore[return-value]

    def fill(self, pieces: dict[str, Piece]) -> None:
        """Read into each piece what the checkpoint has of it, without asking other ranks.

        Raises
        ------
        SnapshotError
            Something is missing or of another shape.
        """
        planner = PieceLoadPlanner()
        planner.set_up_planner(pieces, self._metadata)
        self.read_data(planner.create_local_plan(), planner).wait()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The folder is given once and for all."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[str, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            if item.type is not LoadItemType.TENSOR or item.storage_index not in self._places:
                raise SnapshotError(f"{self._folder} holds no tensor {item.storage_index.fqn}.")
            file, key = self._places[item.storage_index]
            by_file[file].append((key, item))
        for file, items in by_file.items():
            path = inside(self._folder, file)
            try:
                with safe_open(path, framework="pt") as opened:
                    for key, item in items:
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(self._slice(opened, key, item))
                        planner.commit_tensor(item, target)
            except (SafetensorError, OSError, ValueError, IndexError, RuntimeError) as error:
                raise SnapshotError(f"{path} cannot be read: {error}.") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _slice(self, opened: Any, key: str, item: ReadItem) -> Tensor:
        dtype = self.stored[item.storage_index.fqn].properties.dtype
        box = [slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True)]
        if box:
            found: Tensor = opened.get_slice(key)[tuple(box)]
        else:
            found = opened.get_tensor(key)
        if dtype.is_complex:
            found = torch.view_as_complex(found)
        if found.dtype != dtype or found.shape != item.lengths:
            raise ValueError(f"{key} is a {found.dtype} tensor of another shape than {INDEX} says")
        return found

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
