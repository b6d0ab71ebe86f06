"""One measurement out of those of all ranks: pure arithmetic on a table of numbers, the same on every rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kalmanguard.errors import KalmanguardError, RankError
from kalmanguard.records import OVERWRITE, Evidence, FloatArray, Guarantee, Measurement

#: Name of the evidence that the ranks no longer hold the same parameters.
REPLICAS = "replicas"
#: What may have been changed behind the optimizer's back, one bit each; what else a sensor may say counts as the first.
_TAMPERED = ("parameters", "moments", "silent parameters", "silent moments", OVERWRITE)
#: Learning rates for which rows have room; further ones are taken to be the same on all ranks.
_RATES = 16
_VETOES = (None, "nonfinite", "explosion", "clipped")


class _Field(NamedTuple):
    """One number of a row: how it is taken from a measurement."""

    name: str
    of: Callable[[Measurement], float]


def _bits(tampered: tuple[str, ...]) -> int:
    return sum({1 << (_TAMPERED.index(what) if what in _TAMPERED else 0) for what in tampered})


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


#: What stands before the sketches in a row; whether something is there, and what it is, are two numbers, since what is
#: not a number is a fact as well.
_FIELDS = (
    _Field("step", lambda m: float(m.step)),
    _Field("has_loss", lambda m: float(m.loss is not None)),
    _Field("loss", lambda m: _or_nan(m.loss)),
    _Field("has_norm", lambda m: float(m.gradient_norm is not None)),
    _Field("norm", lambda m: _or_nan(m.gradient_norm)),
    _Field("has_buffers", lambda m: float(m.buffer_norm is not None)),
    _Field("buffers", lambda m: _or_nan(m.buffer_norm)),
    _Field("finite", lambda m: float(m.parameters_finite)),
    _Field("floor", lambda m: m.rounding_floor),
    _Field("veto", lambda m: float(_VETOES.index(m.veto))),
    _Field("failed", lambda m: float(m.snapshot_failed)),
    _Field("braced", lambda m: float(m.braced)),
    _Field("tampered", lambda m: float(_bits(m.tampered))),
    _Field("factor", lambda m: m.lr_factor),
    _Field("has_velocity", lambda m: float(m.velocity is not None)),
)
_AT = {field.name: i + 2 for i, field in enumerate(_FIELDS)}
_RATES_AT = 2 + len(_FIELDS)
_HEAD = _RATES_AT + _RATES


def packed(measurement: Measurement | None, position: FloatArray | None, decided: float, *, size: int) -> FloatArray:
    """One rank's row: whether it has measured at all, the digest of its last decision, numbers, velocity, position.

    ``size`` is the length of sketches.
    """
    row = np.zeros(_HEAD + 2 * size)
    row[1] = decided
    if measurement is None:
        return row
    row[0] = 1.0
    row[2:_RATES_AT] = [field.of(measurement) for field in _FIELDS]
    rates = measurement.learning_rates[:_RATES]
    row[_RATES_AT : _RATES_AT + len(rates)] = rates
    if measurement.velocity is not None:
        row[_HEAD : _HEAD + size] = measurement.velocity
    if position is not None:
        row[_HEAD + size :] = position
    return row


def agreed(table: FloatArray, own: Measurement | None) -> Measurement:
    """The measurement that every rank judges.

    The loss is the mean over ranks, norms and rates are the largest, a flag is up where any rank has it up; of the
    velocities it is the one that differs most from the median of all, so that what one rank alone has suffered is not
    averaged away.

    Parameters
    ----------
    table
        Rows of `packed`, shape ``(ranks, n)``.
    own
        This rank's measurement: what is the same on all ranks anyway is taken from it.

    Raises
    ------
    RankError
        A rank is at another step, or has decided otherwise in the step before.
    KalmanguardError
        A rank could not measure.

    Examples
    --------
    >>> rows = [packed(Measurement(step=3, loss=loss), None, 0.0, size=8) for loss in (1.0, 3.0)]
    >>> agreed(np.array(rows), Measurement(step=3, loss=1.0)).loss
    2.0
    """
    missing = table[:, 0] == 0
    if missing.any() or own is None:
        raise KalmanguardError(f"rank {int(missing.argmax())} could not measure the step, so no rank judges it")
    steps, decided = table[:, _AT["step"]], table[:, 1]
    if (steps != steps[0]).any():
        raise RankError(
            f"The ranks are at steps {sorted({int(s) for s in steps})}: each must take the same optimizer steps, and "
            "call update() after each."
        )
    if (decided != decided[0]).any():
        raise RankError(
            f"Rank {int((decided != decided[0]).argmax())} has decided otherwise than rank 0 about step "
            f"{int(steps[0]) - 1}: their records differ. Start again from the last checkpoint."
        )

    def of(name: str) -> FloatArray:
        column: FloatArray = table[:, _AT[name]]
        return column

    losses = of("loss")[of("has_loss") == 1]
    veto = next((_VETOES[int(code)] for code in of("veto") if code), None)
    bits = int(np.bitwise_or.reduce(of("tampered").astype(np.int64)))
    rates = table[:, _RATES_AT : _RATES_AT + min(_RATES, len(own.learning_rates))].max(axis=0).tolist()
    size = (table.shape[1] - _HEAD) // 2
    velocities, positions = table[:, _HEAD : _HEAD + size], table[:, _HEAD + size :]
    finite, moved = bool(of("finite").all()), bool(of("has_velocity").all())
    findings = own.findings
    if not np.array_equal(positions, np.broadcast_to(positions[0], positions.shape), equal_nan=True):
        findings = (*findings, Evidence(REPLICAS, 1.0, True, Guarantee.EXACT, _difference(positions)))
    return dataclasses.replace(
        own,
        loss=float(losses.mean()) if len(losses) else None,
        gradient_norm=float(of("norm").max()) if of("has_norm").any() else None,
        buffer_norm=float(of("buffers").max()) if of("has_buffers").any() else None,
        parameters_finite=finite,
        rounding_floor=float(of("floor").max()),
        veto=veto,
        snapshot_failed=bool(of("failed").any()),
        braced=bool(of("braced").all()),
        tampered=tuple(what for i, what in enumerate(_TAMPERED) if bits >> i & 1),
        learning_rates=(*rates, *own.learning_rates[_RATES:]),
        lr_factor=float(of("factor").max()),
        velocity=velocities[_farthest(velocities)].copy() if finite and moved else None,
        findings=findings,
    )


def _farthest(rows: FloatArray) -> int:
    """The row that lies farthest from the median of all; the first one where all are equal."""
    if (rows == rows[0]).all():
        return 0
    with np.errstate(over="ignore", invalid="ignore"):
        distances = np.square(rows - np.median(rows, axis=0)).sum(axis=1)
    return int(np.nan_to_num(distances, nan=np.inf).argmax())


def _difference(positions: FloatArray) -> str:
    """Which rank's parameters differ, where that can be told."""
    if len(positions) == 2:
        return "ranks 0 and 1 no longer hold the same parameters"
    odd = _farthest(np.nan_to_num(positions, nan=1e300, posinf=1e300, neginf=-1e300))
    return f"the parameters of rank {odd} are no longer those of the other ranks"
