"""Which rank holds which part of a model: replicas, shards, or replicas of shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kalmanguard.records import FloatArray
from kalmanguard.sensors.shards import is_sharded, shard_of


class Holding(NamedTuple):
    """Parameters that the same ranks hold the same elements of.

    Attributes
    ----------
    parameters
        Names and parameters.
    holders
        Number of ranks that hold just this, this one included.
    owned
        Whether this rank is the first of them: it is the one that counts where elements must be counted once.
    slot
        Number of this part among those that several ranks hold; ``None`` where nobody else does.
    """

    parameters: list[tuple[str, Tensor]]
    holders: int = 1
    owned: bool = True
    slot: int | None = None


class Holdings(NamedTuple):
    """What this rank holds, and by how many each part is held that is held more than once.

    Attributes
    ----------
    parts
        This rank's parts.
    shared
        Numbers of holders, by slot; the same on all ranks.
    total
        Elements of the whole model.
    """

    parts: list[Holding]
    shared: tuple[int, ...]
    total: int


def holdings(
    named_parameters: Iterable[tuple[str, Tensor]],
    rank: int,
    gather: Callable[[FloatArray], FloatArray],
) -> Holdings:
    """Find out who holds what: one exchange of a few numbers, at construction.

    Parameters
    ----------
    named_parameters
        Names and parameters, in the same order on all ranks.
    rank
        Of this process.
    gather
        Given this rank's numbers, shape ``(n,)``, returns those of all, shape ``(ranks, n)``; rows shorter than the
        longest are filled with zeros.
    """
    groups: dict[object, list[tuple[str, Tensor]]] = {}
    total = 0
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        total += parameter.numel()
        groups.setdefault(_placement(parameter), []).append((name, parameter))
    kept = [group for group in groups.values() if any(shard_of(name, p).tensor.numel() for name, p in group)]
    table = gather(np.array([_number(group) for group in kept]))
    numbers, counts = np.unique(table[table != 0], return_counts=True)
    slots = {number: i for i, number in enumerate(numbers[counts > 1].tolist())}
    parts = []
    for group, number in zip(kept, table[rank].tolist(), strict=False):
        holding = np.flatnonzero((table == number).any(axis=1))
        parts.append(Holding(group, len(holding), int(holding[0]) == rank, slots.get(number)))
    return Holdings(parts, tuple(counts[counts > 1].tolist()), total)


def _placement(parameter: Tensor) -> object:
    """What tells apart parameters that may be spread over the ranks in different ways."""
    if not is_sharded(parameter):
        return None
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return mesh, tuple(map(str, placements))


def _number(group: list[tuple[str, Tensor]]) -> float:
    """A number that is the same where names and blocks are; 52 bits are exact in a float64, and none is zero."""
    blocks = [(name, shard_of(name, parameter)) for name, parameter in group]
    text = repr([(name, b.whole, b.offset, tuple(b.tensor.shape)) for name, b in blocks if b.tensor.numel()])
    return float((int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 12) | 1)
