"""What one rank puts into a sharded checkpoint, and what it takes out of one, whatever ranks wrote it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from kalmanguard.distributed.parts import Part, live_parts, numbered, part_of
from kalmanguard.distributed.planning import Piece
from kalmanguard.distributed.storage import ShardReader
from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.checkpoint import SHARDED_FORMAT, VERSION, check_format
from kalmanguard.snapshots.codec import decode, encode
from kalmanguard.snapshots.digest import tensor_digest
from kalmanguard.snapshots.files import inside, read_json
from kalmanguard.snapshots.rng import RandomState

#: By name, the type of a tensor and the part of it that a rank holds.
Boxes = dict[str, tuple[str, Part]]
#: What must be the same whichever ranks load it; of the rest (buffers, random streams, cursors) each rank has its own.
_ONE_FOR_ALL: Final = ("tree/state/", "tree/gradients/")


def content_file(rank: int) -> str:
    """Name of the file with everything of a rank that is no tensor."""
    return f"rank-{rank:05d}.json"


@final
class Content:
    """A rank's tree and metadata: text, and tensors by name.

    Parameters
    ----------
    tree, meta
        Values for `snapshots.codec`; not copied.
    parts
        By name, what this rank's tensors are parts of; see `live_parts`.

    Raises
    ------
    SnapshotError
        A value that a checkpoint cannot keep.
    """

    def __init__(self, tree: Any, meta: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
        skeleton, names, tensors = numbered({"tree": tree, "meta": meta})
        self._text, encoded = encode(skeleton)
        self._names = {
            key: names[int(number)] if key.startswith("t") else f"arrays/{key}" for key, number in encoded.items()
        }
        self._tensors = {
            **dict(zip(names, tensors, strict=True)),
            **{f"arrays/{key}": array for key, array in encoded.items() if not key.startswith("t")},
        }
        # Of a tensor without known placement, this rank holds a whole.
        self._parts = {
            name: parts[name]
            if name in parts and parts[name].sizes == tuple(tensor.shape)
            else Part.whole(tensor.shape)
            for name, tensor in self._tensors.items()
        }
        self._distributed = frozenset(name for name in self._tensors if self._parts[name] is parts.get(name))

    def boxes(self) -> Boxes:
        """By name, the type of each tensor and which part of the whole is here."""
        return {
            name: (str(tensor.dtype), self._parts[name])
            for name, tensor in self._tensors.items()
            if not self._parts[name].nothing
        }

    def digests(self, names: Collection[str]) -> dict[str, bytes]:
        """SHA-256 digests of some tensors."""
        return {name: tensor_digest(self._tensors[name]) for name in names if name in self._tensors}

    def pieces(self, own: Collection[str], rank: int) -> tuple[dict[str, Piece], str]:
        """Name everything for the checkpoint.

        Parameters
        ----------
        own
            Names of what each rank stores for itself; see `differing`.
        rank
            Of this process.

        Returns
        -------
        tuple
            Pieces by name, and the text of `content_file`.
        """
        stored = {name: f"rank-{rank}/{name}" if name in own else name for name in self._tensors}
        pieces = {
            stored[name]: Piece(tensor, Part.whole(tensor.shape) if name in own else self._parts[name])
            for name, tensor in self._tensors.items()
        }
        table = {
            key: {"name": stored[name], "path": name, "distributed": name in self._distributed}
            for key, name in self._names.items()
        }
        data = {"format": SHARDED_FORMAT, "version": VERSION, "content": json.loads(self._text), "tensors": table}
        return pieces, json.dumps(data)


def held_twice(boxes: Sequence[Boxes]) -> set[str]:
    """Names of which several ranks hold the same part, as replicas do; given the boxes of all ranks."""
    count = Counter((name, box) for held in boxes for name, box in held.items())
    return {name for (name, _), ranks in count.items() if ranks > 1}


def differing(held: Sequence[tuple[Boxes, Mapping[str, bytes]]]) -> set[str]:
    """Names that do not mean the same on all ranks, so that each must store its own.

    Either the wholes are of different shape or type, or ranks that hold the same part hold different bytes of it:
    running statistics, random streams, cursors, or parameters of models that only share their names. Without this a
    part that is held twice would be stored once, whatever the others hold.

    Parameters
    ----------
    held
        Boxes and digests of all ranks.
    """
    wholes: dict[str, object] = {}
    bytes_of: dict[object, bytes] = {}
    found = set()
    for boxes, digests in held:
        for name, (dtype, part) in boxes.items():
            alike = wholes.setdefault(name, (dtype, part.shape)) == (dtype, part.shape)
            if name in digests:
                alike &= bytes_of.setdefault((name, part), digests[name]) == digests[name]
            if not alike:
                found.add(name)
    return found


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
