"""Which snapshots the ring keeps: ages spread evenly on a logarithmic scale, the newest and the best always."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

#: Uncertified states that may wait in the ring for a probe.
CANDIDATES = 2
#: A ring so small that a certified capture supersedes the candidates.
SMALL_RING = 4
#: States that a ring holds at most: more would only be older ones of the same ages.
MOST_SLOTS = 8


class Slot(NamedTuple):
    """One state in the ring: its step, whether a probe has certified it, and the filtered probe level there.

    ``suspect``: captured in the first step of a suspicion. Its held-out loss is good, but what caused the suspicion may
    be in its moments, so it is for a halt, and otherwise the last resort.
    """

    step: int
    certified: bool
    level: float
    suspect: bool = False


def to_evict(slots: Iterable[Slot], now: int, capacity: int, *, certified: bool) -> tuple[int, ...]:
    """Steps to give up before a state of step ``now`` is captured, so that at most ``capacity`` remain with it.

    In a small ring a certified capture supersedes the candidates. Of the certified states the newest and the best are
    kept; among the others the one goes whose neighbours in age are closest in ratio.

    Examples
    --------
    >>> ring = [Slot(s, True, 1.0 - s / 1000) for s in (10, 50, 60, 80, 95)]
    >>> to_evict(ring, 100, 5, certified=True)
    (50,)
    """
    kept = list(slots)
    gone: list[int] = []
    candidates = [s for s in kept if not s.certified]
    # A candidate may lie before an onset that a later, certified state lies behind: where there is room, it is kept.
    room = 0 if certified and capacity <= SMALL_RING else CANDIDATES - (not certified)
    surplus = candidates[: max(0, len(candidates) - room)]
    for slot in surplus:
        kept.remove(slot)
        gone.append(slot.step)
    while len(kept) >= capacity and kept:
        slot = _least_useful(kept, now)
        kept.remove(slot)
        gone.append(slot.step)
    return tuple(gone)


def _least_useful(slots: list[Slot], now: int) -> Slot:
    settled = [s for s in slots if s.certified]
    waiting = [s for s in slots if not s.certified]
    if len(settled) <= 2 and waiting:
        return waiting[0]
    best = min(settled, key=lambda s: s.level)
    if len(settled) <= 2:
        return next((s for s in settled if s is not best), best)
    ages = [math.log(now - s.step + 1.0) for s in settled]
    inner = [(ages[i - 1] - ages[i + 1], i) for i in range(1, len(settled) - 1) if settled[i].step != best.step]
    if not inner:
        return settled[0] if settled[0].step != best.step else settled[1]
    return settled[min(inner)[1]]
