"""Steps of a journal as columns of numbers, many rows at once."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kalmanguard.errors import JournalError
from kalmanguard.journal.codec import (
    GRADIENT_NORM,
    HEAD,
    LOSS,
    PROBE,
    VELOCITY,
    VERSION,
)
from kalmanguard.journal.schema import Row
from kalmanguard.records import FloatArray

#: What is drawn. ``lost``: whether a training or held-out loss was not finite. ``damping``: jerk over acceleration of
#: the sketched updates. ``level`` and ``mode`` are the codes of `kalmanguard.journal.codec`.
COLUMNS: Final = (
    "loss", "gradient_norm", "update_norm", "learning_rate", "lost",
    "y", "predicted_low", "predicted_high", "bound", "y_best", "give_back",
    "z_probe", "z_loss", "z_gradient", "z_gain", "z_buffers", "z_trajectory",
    "damping", "level", "mode",
)  # fmt: skip
AT: Final = {name: index for index, name in enumerate(COLUMNS)}

IntArray = NDArray[np.int64]

_HEADS = np.dtype(
    [(name, "u1") for name in ("version", "veto", "action", "proposed", "level", "mode", "certificate")]
    + [("rates", "<u2")]
    + [(name, "<u4") for name in ("flags", "velocity", "losses", "values", "reason", "tail", "objective", "rung")]
    + [(name, "<i8") for name in ("step", "decision_step", "restored", "restore")]
    + [(name, "<f8") for name in ("loss", "lr_factor", "gradient_norm", "rounding_floor", "buffer_norm", "gate")]
)
assert _HEADS.itemsize == HEAD.size
#: Names in the journal's statistics.
_TAKEN = ("z_loss", "z_gradient", "z_gain", "z_buffers", "z_trajectory")
_PROBED = ("y", "predicted", "scale", "bound", "y_best", "y0")
#: Standard deviations of the prediction that the band shows.
BAND = 2.0
#: Steps that the jerk ratio remembers.
MEMORY = 128


class StepTable:
    """A stretch of steps: ``heads`` as they are packed, ``steps`` of shape ``(n,)``, ``values`` ``(n, len(COLUMNS))``.

    A value that was not measured, or is not finite, is nan.
    """

    def __init__(self, seqs: IntArray, heads: NDArray[np.void], values: FloatArray) -> None:
        self.seqs, self.heads, self.values = seqs, heads, values

    @property
    def steps(self) -> IntArray:
        """Step of every row."""
        found: IntArray = self.heads["step"]
        return found


class Decoder:
    """Turns rows of steps into a `StepTable`; remembers what the jerk ratio needs of the rows before.

    Parameters
    ----------
    statistics
        Names of the per-step statistics, as the journal's header gives them.

    Notes
    -----
    The jerk ratio is ``sqrt(sum |v_t - 2 v_{t-1} + v_{t-2}|^2 / sum
    |v_t - v_{t-1}|^2)`` with weights that fade over 128 steps; velocities without memory give 1.73. HEURISTIC.
    """

    def __init__(self, statistics: Sequence[str]) -> None:
        places = {name: index for index, name in enumerate(statistics) if isinstance(name, str)}
        self._taken = [places.get(name, -1) for name in _TAKEN]
        self._probed = [places.get(name, -1) for name in _PROBED]
        self._earlier: list[FloatArray] = []
        self._jerk = self._acceleration = 0.0

    def decode(self, rows: Sequence[Row]) -> StepTable:
        """Decode rows of the kind ``step``, in the journal's order.

        Raises
        ------
        JournalError
            A row is malformed, or of a version that this package does not know.
        """
        bodies = [row.body for row in rows]
        for row, body in zip(rows, bodies, strict=True):
            if not isinstance(body, bytes) or len(body) < HEAD.size or not isinstance(row.blob, bytes):
                raise JournalError(f"Record {row.seq} of the journal is no step that can be read.")
        heads = np.frombuffer(b"".join(body[: HEAD.size] for body in bodies if isinstance(body, bytes)), _HEADS)
        if (odd := heads["version"] != VERSION).any():
            raise JournalError(
                f"Record {rows[int(odd.argmax())].seq} of the journal has the layout version "
                f"{int(heads['version'][odd.argmax()])}; this kalmanguard knows {VERSION}."
            )
        values = np.full((len(rows), len(COLUMNS)), np.nan)
        flags = heads["flags"]
        with np.errstate(invalid="ignore"):
            _put(values, "loss", heads["loss"], flags & LOSS)
            _put(values, "gradient_norm", heads["gradient_norm"], flags & GRADIENT_NORM)
        lost = (flags & LOSS).astype(bool) & ~np.isfinite(heads["loss"])
        for index, (row, head) in enumerate(zip(rows, heads.tolist(), strict=True)):
            try:
                lost[index] |= self._row(values[index], row, head)
            except (struct.error, ValueError, IndexError) as error:
                raise JournalError(f"Record {row.seq} of the journal is malformed ({error}).") from error
        values[:, AT["lost"]] = np.where(flags & (LOSS | PROBE), lost, np.nan)
        values[:, AT["level"]], values[:, AT["mode"]] = heads["level"], heads["mode"]
        values[~np.isfinite(values)] = np.nan
        return StepTable(np.fromiter((row.seq for row in rows), np.int64, len(rows)), heads, values)

    def _row(self, out: FloatArray, row: Row, head: tuple[int | float, ...]) -> bool:
        """Fill in what the head does not hold; returns whether a held-out loss was not finite."""
        rates, flags, n_velocity, n_losses = (int(value) for value in head[7:11])
        if rates:
            assert isinstance(row.body, bytes)
            out[AT["learning_rate"]] = max(struct.unpack_from(f"<{rates}d", row.body, HEAD.size)) * float(head[21])
        numbers = np.frombuffer(row.blob, "<f8")
        if flags & VELOCITY:
            self._velocity(out, numbers[:n_velocity])
        statistics = numbers[n_velocity + n_losses :].tolist()
        for at, place in enumerate(self._taken, AT["z_loss"]):
            if 0 <= place < len(statistics):
                out[at] = statistics[place]
        if not flags & PROBE:
            return False
        y, predicted, scale, bound, best, start = (
            statistics[place] if 0 <= place < len(statistics) else math.nan for place in self._probed
        )
        if math.isnan(y) and n_losses:
            y = float(numbers[n_velocity : n_velocity + n_losses].mean())
        out[AT["y"] : AT["give_back"]] = y, predicted - BAND * scale, predicted + BAND * scale, bound, best
        if start > best:
            out[AT["give_back"]] = max(0.0, (y - best) / (start - best))
        if scale > 0:
            out[AT["z_probe"]] = (y - predicted) / scale
        return not math.isfinite(y)

    def _velocity(self, out: FloatArray, velocity: FloatArray) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            square = float(velocity @ velocity)
            out[AT["update_norm"]] = math.sqrt(square) if square >= 0 else math.nan
            if not math.isfinite(square) or (self._earlier and len(self._earlier[-1]) != len(velocity)):
                self._earlier = []
                return
            if len(self._earlier) == 2:
                before, last = self._earlier
                change = velocity - last
                jerk = change - (last - before)
                kept = 1.0 - 1.0 / MEMORY
                self._jerk = kept * self._jerk + float(jerk @ jerk)
                self._acceleration = kept * self._acceleration + float(change @ change)
                if self._acceleration > 0:
                    out[AT["damping"]] = math.sqrt(self._jerk / self._acceleration)
            self._earlier = [*self._earlier[-1:], velocity]


def _put(values: FloatArray, name: str, column: FloatArray, known: NDArray[np.integer[Any]]) -> None:
    values[:, AT[name]] = np.where(known != 0, column, np.nan)
