"""One measurement out of those of all ranks: pure arithmetic, the same on every rank."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kalmanguard.errors import KalmanguardError, RankError
from kalmanguard.records import OVERWRITE, Evidence, FloatArray, Guarantee, Measurement

#: Name of the evidence that ranks which should hold the same parameters no longer do.
REPLICAS = "replicas"
#: What may have been changed behind the optimizer's back; what else a sensor may say counts as the first.
_TAMPERED = ("parameters", "moments", "silent parameters", "silent moments", OVERWRITE)
#: Bits of a number whose square, added up over 30,000 ranks, is still exact in a float64.
_BITS = 19
#: Numbers before those of the parts: three that must be equal, each with its square, counts, and sums.
_EQUAL = ("step", "decided", "applied")
_COUNTS = ("measured", "loss", "finite", "moved", "buffers")
_SUMS = ("loss", "buffers", "floor")


class Sensed(NamedTuple):
    """What one rank has measured in one step.

    Attributes
    ----------
    measurement
        Its measurement.
    decided
        Digest of what it has decided in the step before.
    positions, velocities
        Sketches of its parts; no velocities where it has none.
    floors
        Rounding floors of its parts.
    """

    measurement: Measurement
    decided: int
    positions: list[FloatArray]
    velocities: list[FloatArray] | None
    floors: list[float]


class Role(NamedTuple):
    """What this rank has to do with its part of that number; see `Holding`."""

    owned: bool
    slot: int | None


class Summary:
    """All that is told of a step as one vector that is added up over the ranks.

    Counts and digests are whole numbers below 2^53, so their sums are exact, and that numbers are equal on n ranks is
    seen by ``n sum(x^2) = (sum x)^2``. Losses and velocities are rounded, in the same way on every rank, since all get
    the same sum.

    Parameters
    ----------
    ranks
        Number of ranks.
    roles
        This rank's parts.
    shared
        Number of holders of each part that is held more than once.
    size
        Length of a sketch.
    """

    def __init__(self, *, ranks: int, roles: Sequence[Role], shared: Sequence[int], size: int) -> None:
        self._ranks, self._roles, self._shared, self._size = ranks, list(roles), tuple(shared), size
        self._counts_at = 2 * len(_EQUAL)
        self._tampered_at = self._counts_at + len(_COUNTS)
        self._sums_at = self._tampered_at + len(_TAMPERED)
        self._slots_at = self._sums_at + len(_SUMS)
        self._velocity_at = self._slots_at + 2 * len(self._shared)

    @property
    def length(self) -> int:
        """Numbers of a vector."""
        return self._velocity_at + self._size

    def vector(self, sensed: Sensed | None) -> FloatArray:
        """Give the share of this rank; ``None`` when it could not measure."""
        row = np.zeros(self.length)
        if sensed is None:
            return row
        m = sensed.measurement
        for i, number in enumerate((m.step & (1 << _BITS) - 1, sensed.decided, _applied(m))):
            row[2 * i : 2 * i + 2] = number, number * number
        moved = sensed.velocities is not None
        buffers = 0.0 if m.buffer_norm is None else m.buffer_norm * m.buffer_norm
        counts = (True, _is_number(m.loss), m.parameters_finite, moved, math.isfinite(buffers))
        row[self._counts_at : self._tampered_at] = counts
        known = [what if what in _TAMPERED else _TAMPERED[0] for what in m.tampered]
        row[self._tampered_at : self._sums_at] = [what in known for what in _TAMPERED]
        floor = sum(f * f for f, role in zip(sensed.floors, self._roles, strict=True) if role.owned)
        row[self._sums_at : self._slots_at] = (
            m.loss if m.loss is not None and math.isfinite(m.loss) else 0.0,
            buffers if math.isfinite(buffers) else 0.0,
            floor if math.isfinite(floor) else 0.0,
        )
        for position, role in zip(sensed.positions, self._roles, strict=True):
            if role.slot is not None:
                number, at = short_digest(position.tobytes()), self._slots_at + 2 * role.slot
                row[at : at + 2] = number, number * number
        for velocity, role in zip(sensed.velocities or (), self._roles, strict=moved):
            if role.owned:
                row[self._velocity_at :] += velocity
        return row

    def agreed(self, total: FloatArray, own: Measurement) -> Measurement | None:
        """The measurement that every rank judges, from the sum of all vectors; ``None`` where each must be asked.

        The loss is the mean over ranks, the velocity that of the whole model; a flag is up where any rank has it up.
        """
        counts = dict(zip(_COUNTS, total[self._counts_at : self._tampered_at].tolist(), strict=True))
        equal = [self._ranks] * len(_EQUAL) + list(self._shared)
        pairs = [*total[: self._counts_at].reshape(-1, 2).tolist()]
        pairs += total[self._slots_at : self._velocity_at].reshape(-1, 2).tolist()
        together = all(n * int(square) == int(x) ** 2 for n, (x, square) in zip(equal, pairs, strict=True))
        if not together or counts["measured"] < self._ranks:
            return None
        # A loss that is no number on one rank is none on any.
        if own.loss is not None and counts["loss"] < self._ranks:
            return None
        loss, buffers, floor = total[self._sums_at : self._slots_at].tolist()
        finite = counts["finite"] == self._ranks
        moved = finite and counts["moved"] == self._ranks
        tampered = total[self._tampered_at : self._sums_at].tolist()
        return dataclasses.replace(
            own,
            loss=loss / self._ranks if own.loss is not None else None,
            buffer_norm=None if own.buffer_norm is None else _root_mean(buffers, counts["buffers"], self._ranks),
            parameters_finite=finite,
            rounding_floor=math.sqrt(floor) if finite else 0.0,
            tampered=tuple(what for what, count in zip(_TAMPERED, tampered, strict=True) if count),
            velocity=total[self._velocity_at :] if moved else None,
        )


def settled(told: Sequence[tuple[Sensed | None, Sequence[Role]]], own: Measurement) -> Measurement:
    """The measurement that every rank judges, from what each of them has measured: the slow way.

    Parameters
    ----------
    told
        What each rank has measured, and its roles.
    own
        This rank's measurement: what is the same on all ranks anyway is taken from it.

    Returns
    -------
    Measurement
        As by `Summary.agreed`; of several velocities of one part it is the one that differs most from the median of
        all, so that what one rank alone has suffered is not averaged away.

    Raises
    ------
    RankError
        A rank is at another step, or has decided otherwise in the step before.
    KalmanguardError
        A rank could not measure.
    """
    sensed = [item for item, _ in told if item is not None]
    if len(sensed) < len(told):
        missing = next(rank for rank, (item, _) in enumerate(told) if item is None)
        raise KalmanguardError(f"rank {missing} could not measure a step, so no rank judges it")
    _together(sensed)
    all_of = [item.measurement for item in sensed]
    parts: dict[object, list[tuple[int, Sensed, int]]] = {}
    for rank, (item, roles) in enumerate(told):
        assert item is not None
        for i, role in enumerate(roles):
            parts.setdefault((rank, i) if role.slot is None else role.slot, []).append((rank, item, i))
    finite, moved = all(m.parameters_finite for m in all_of), all(s.velocities is not None for s in sensed)
    velocity, findings = None, own.findings
    if finite and moved:
        velocity = np.sum([_farthest(_velocities(holders)) for holders in parts.values()], axis=0)
    for holders in parts.values():
        positions = np.array([item.positions[i] for _, item, i in holders])
        if not np.array_equal(positions, np.broadcast_to(positions[0], positions.shape), equal_nan=True):
            what = _difference(positions, [rank for rank, _, _ in holders])
            findings = (*findings, Evidence(REPLICAS, 1.0, True, Guarantee.EXACT, what))
            break
    losses = [m.loss for m in all_of if m.loss is not None]
    buffers = [m.buffer_norm for m in all_of if m.buffer_norm is not None]
    floors = [max(item.floors[i] for _, item, i in holders) for holders in parts.values()]
    marks = {what if what in _TAMPERED else _TAMPERED[0] for m in all_of for what in m.tampered}
    rates = zip(*(m.learning_rates for m in all_of), strict=False)
    return dataclasses.replace(
        own,
        loss=float(np.mean(losses)) if losses else None,
        buffer_norm=max(buffers, default=None),
        parameters_finite=finite,
        rounding_floor=math.sqrt(sum(f * f for f in floors)) if finite else 0.0,
        tampered=tuple(what for what in _TAMPERED if what in marks),
        learning_rates=tuple(max(group) for group in rates),
        lr_factor=max(m.lr_factor for m in all_of),
        velocity=velocity,
        findings=findings,
    )


def short_digest(data: bytes) -> int:
    """A whole number of 19 bits that differs where the data does, but for one time in 524,288."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> (64 - _BITS)


def _applied(m: Measurement) -> int:
    """Digest of what should be the same on all ranks without being told."""
    return short_digest(repr((m.learning_rates, m.lr_factor, m.loss is None)).encode())


def _together(sensed: list[Sensed]) -> None:
    steps = [item.measurement.step for item in sensed]
    if len(set(steps)) > 1:
        raise RankError(
            f"The ranks are at steps {sorted(set(steps))}: each must take the same optimizer steps, and call update() "
            "after each."
        )
    decided = [item.decided for item in sensed]
    if len(set(decided)) > 1:
        odd = next(rank for rank, number in enumerate(decided) if number != decided[0])
        raise RankError(
            f"Rank {odd} has decided otherwise than rank 0 about step {steps[0] - 1}: their records differ. Start "
            "again from the last checkpoint."
        )


def _velocities(holders: list[tuple[int, Sensed, int]]) -> FloatArray:
    found: FloatArray = np.array([item.velocities[i] for _, item, i in holders if item.velocities is not None])
    return found


def _farthest(rows: FloatArray) -> FloatArray:
    """The row that lies farthest from the median of all; the first one where all are equal."""
    row: FloatArray = rows[_odd(rows)]
    return row


def _odd(rows: FloatArray) -> int:
    if (rows == rows[0]).all():
        return 0
    with np.errstate(over="ignore", invalid="ignore"):
        distances = np.square(rows - np.median(rows, axis=0)).sum(axis=1)
    return int(np.nan_to_num(distances, nan=np.inf).argmax())


def _difference(positions: FloatArray, ranks: list[int]) -> str:
    """Which rank's parameters differ, where that can be told."""
    if len(ranks) == 2:
        return f"ranks {ranks[0]} and {ranks[1]} no longer hold the same parameters"
    odd = _odd(np.nan_to_num(positions, nan=1e300, posinf=1e300, neginf=-1e300))
    return f"the parameters of rank {ranks[odd]} are no longer those of the ranks that should hold the same"


def _root_mean(square: float, seen: float, ranks: int) -> float:
    return math.sqrt(square / ranks) if seen == ranks else math.inf


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
