"""What one rank takes out of a sharded checkpoint, whatever number of ranks wrote it on whatever mesh."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from kalmanguard.distributed.content import content_file
from kalmanguard.distributed.parts import Part, live_parts, part_of
from kalmanguard.distributed.planning import Piece
from kalmanguard.distributed.storage import ShardReader
from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.checkpoint import SHARDED_FORMAT, check_format
from kalmanguard.snapshots.codec import decode
from kalmanguard.snapshots.files import inside, read_json
from kalmanguard.snapshots.rng import RandomState

#: What must be the same whichever ranks load it; of the rest (buffers, random streams, cursors) each rank has its own.
_ONE_FOR_ALL: Final = ("tree/state/", "tree/gradients/")


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """What a rank has read.

    Attributes
    ----------
    tree
        For `TrainingState.load_tree`, with this rank's parts.
    meta
        Of this rank, or of rank 0 where another number of ranks wrote it.
    distributed
        Paths of the optimizer state that must be DTensors.
    """

    tree: dict[str, Any]
    meta: dict[str, Any]
    distributed: frozenset[str]


def read_content(
    folder: Path, *, rank: int, size: int, modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]
) -> Loaded:
    """Read this rank's part of a checkpoint: of each tensor what the live one holds here.

    Parameters
    ----------
    folder
        The checkpoint; its files were compared with their digests.
    rank, size
        Of this process, and how many there are.
    modules, optimizers
        The live objects, whose placements decide.

    Raises
    ------
    SnapshotError
        Damaged; another model; or something that only as many ranks as wrote it can load.
    """
    reader = ShardReader(folder)
    same = reader.ranks == size
    path = inside(folder, content_file(rank if same else 0))
    data = read_json(path, "a rank's part of a checkpoint")
    check_format(data, path, SHARDED_FORMAT)
    homes = _Homes(modules, optimizers)
    pieces: dict[str, Piece] = {}
    distributed = set()
    try:
        table = {key: (str(e["name"]), str(e["path"]), bool(e["distributed"])) for key, e in data["tensors"].items()}
        text = json.dumps(data["content"])
    except (KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"{path} is damaged: {type(error).__name__} {error}.") from error
    for name, where, was_distributed in table.values():
        stored = reader.stored.get(name)
        if stored is None:
            raise SnapshotError(f"{path} is damaged: it names {name!r}, which the checkpoint does not hold.")
        if name != where and not same and (where.startswith(_ONE_FOR_ALL) or "/parameters/" in where):
            raise SnapshotError(
                f"{where} was not the same on the {reader.ranks} ranks that saved it, so it can be loaded on "
                f"{reader.ranks} ranks only, and this run has {size}."
            )
        shape = tuple(stored.size)
        if name != where:
            part, spread = Part.whole(shape), was_distributed
        else:
            part, spread = homes.part(where, shape, was_distributed)
        if spread:
            distributed.add(where)
        if part.shape != shape:
            raise SnapshotError(
                f"{where} is {shape} in the checkpoint and {part.shape} now: rebuild the model as it was."
            )
        pieces[name] = Piece(torch.empty(part.sizes, dtype=stored.properties.dtype), part)
    reader.fill(pieces)
    content = decode(text, {key: pieces[name].tensor for key, (name, _, _) in table.items()})
    if not isinstance(content, dict) or not isinstance(content.get("meta"), dict) or "tree" not in content:
        raise SnapshotError(f"{path} is not a rank's part of a checkpoint.")
    tree = content["tree"]
    if not same and rank > 0 and isinstance(tree, dict) and "random" in tree:
        tree["random"] = RandomState.capture().tree()  # two ranks must not draw the same numbers
    return Loaded(tree, content["meta"], frozenset(distributed))


def create_state(optimizers: Sequence[Optimizer], loaded: Loaded) -> list[tuple[Optimizer, Tensor]]:
    """Give sharded parameters that have no optimizer state yet DTensors to be written into; return whose."""
    made: list[tuple[Optimizer, Tensor]] = []
    for number, (optimizer, states) in enumerate(zip(optimizers, loaded.tree["state"], strict=False)):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for ordinal, state in states.items():
            parameter = parameters[ordinal] if isinstance(ordinal, int) and ordinal < len(parameters) else None
            if not isinstance(parameter, DTensor) or not isinstance(state, dict) or optimizer.state.get(parameter):
                continue
            spread = {
                name: _like(parameter, value)
                for name, value in state.items()
                if isinstance(value, Tensor) and f"tree/state/{number}/{ordinal}/{name}" in loaded.distributed
            }
            if spread:
                optimizer.state[parameter] = spread
                made.append((optimizer, parameter))
    return made


def _like(parameter: DTensor, local: Tensor) -> Tensor:
    """A DTensor around an empty ``local``: placed like the parameter if it is its shard, else on every rank."""
    empty = torch.empty_like(local, device=parameter.to_local().device)
    if local.shape == parameter.to_local().shape:
        return DTensor.from_local(
            empty,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return DTensor.from_local(empty, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim, run_check=False)


class _Homes:
    """Where each tensor of a checkpoint goes in the live state."""

    def __init__(self, modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> None:
        self._live = live_parts(modules, optimizers)
        self._states: dict[str, tuple[DTensor, Mapping[str, Any]]] = {}
        for number, optimizer in enumerate(optimizers):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for ordinal, parameter in enumerate(parameters):
                if isinstance(parameter, DTensor):
                    self._states[f"tree/state/{number}/{ordinal}"] = parameter, optimizer.state.get(parameter) or {}

    def part(self, path: str, shape: tuple[int, ...], was_distributed: bool) -> tuple[Part, bool]:
        """What this rank needs of a tensor, and whether it is optimizer state that must be a DTensor."""
        live = self._live.get(path)
        if live is not None:
            return live, False
        home, _, name = path.rpartition("/")
        if home not in self._states:
            return Part.whole(shape), False
        parameter, state = self._states[home]
        if isinstance(state.get(name), Tensor):  # it is there, and it is no DTensor
            return Part.whole(shape), False
        # State of the parameter's shape is kept beside it; ``step`` may have it by chance, of a parameter without any.
        like = shape == tuple(parameter.shape) and (was_distributed or name != "step")
        part = part_of(parameter) if like else None
        return part or Part.whole(shape), like or was_distributed
