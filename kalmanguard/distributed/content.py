"""What one rank puts into a sharded checkpoint: text, and tensors by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, final

from kalmanguard.distributed.parts import Part, numbered
from kalmanguard.distributed.planning import Piece
from kalmanguard.snapshots.checkpoint import SHARDED_FORMAT, VERSION
from kalmanguard.snapshots.codec import encode
from kalmanguard.snapshots.digest import tensor_digest

#: By name, the type of a tensor and the part of it that a rank holds.
Boxes = dict[str, tuple[str, Part]]


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
