"""Dead units: features that used to fire and do not any more, whatever the input."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kalmanguard.forensics.checks.check import Need
from kalmanguard.forensics.report import Finding, Severity
from kalmanguard.forensics.samples import Array, Sample

#: A unit fires where its magnitude exceeds this share of the layer's root mean square in its first sample.
_FIRES_FRAC = 1e-4
#: Nats by which silence must be unlikely, given how often the unit fired before: 6e-6 for independent rows.
_SILENCE_NATS = 12.0
_MEMORY = 32
_WARNING_FRAC, _CRITICAL_FRAC = 0.25, 0.5


@dataclass(slots=True)
class _Layer:
    threshold: float
    rate: NDArray[np.float64]
    silent: NDArray[np.float64]
    samples: int = 0
    last: float = field(default=0.0)


class DeadUnits:
    """Share of the units that fired before and have been silent for longer than their own rate of firing explains.

    Unit i fires in a share ``p_i`` of the rows (positions, examples). When it is silent for n rows in succession, that
    has probability ``(1 - p_i)^n <= exp(-n p_i)`` in independent rows; it counts as dead once ``n p_i > 12``. So a unit
    that fires at every second row is judged after 24 of them, a rare one later, and a ReLU layer that is 60 % zeros has
    no dead unit. A unit that never fired (a constant pixel) is nobody's loss. A warning when a quarter, critical when
    half of the units that ever fired are dead.

    Notes
    -----
    Guarantee: HEURISTIC (rows of one batch and one sequence are not independent). What is looked at are the *inputs* of
    layers with a weight matrix, so rectifiers count in whatever way they are called; the units of the last layer are
    not seen, nor more than 512 (evenly spaced) of a wider layer. Latency: ``24 / (rows a sample)`` samples of the layer
    for units that fire half of the time, and one sample is due in every detection latency. Cost: a few passes over 64 x
    512 numbers.
    """

    name = "dead_units"
    needs = frozenset({Need.FEATURES})

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    def judge(self, sample: Sample) -> list[Finding]:
        found = []
        for seen in sample.layers:
            if seen.features is None or not seen.judged:
                continue
            rows = seen.features.rows
            layer = self._layers.get(seen.name)
            if layer is None or len(layer.rate) != rows.shape[1]:
                layer = self._begin(seen.name, rows)
            if layer is not None:
                found.append(self._update(seen.name, layer, rows))
        return found

    def forget(self) -> None:
        for layer in self._layers.values():
            layer.silent[:] = 0.0

    def _begin(self, name: str, rows: Array) -> _Layer | None:
        size = float(np.sqrt(np.mean(np.square(rows, dtype=np.float64))))
        if not 0.0 < size < np.inf:
            return None
        units = rows.shape[1]
        layer = self._layers[name] = _Layer(_FIRES_FRAC * size, np.zeros(units), np.zeros(units))
        return layer

    def _update(self, name: str, layer: _Layer, rows: Array) -> Finding:
        frac = (np.abs(rows) > layer.threshold).mean(axis=0, dtype=np.float64)
        fires = frac > 0.0
        layer.samples += 1
        weight = 1.0 / min(layer.samples, _MEMORY)
        # While it is silent a unit keeps the rate it had, or it would excuse itself.
        layer.rate = np.where(fires | (layer.silent == 0.0), layer.rate + weight * (frac - layer.rate), layer.rate)
        layer.silent = np.where(fires, 0.0, layer.silent + len(rows))
        alive_once = layer.rate > 0.0
        dead = layer.silent * layer.rate > _SILENCE_NATS
        share = float(dead.sum() / max(1, int(alive_once.sum())))
        severity = (
            Severity.CRITICAL
            if share >= _CRITICAL_FRAC
            else Severity.WARNING
            if share >= _WARNING_FRAC
            else Severity.OK
        )
        message = f"{share:.0%} of the units that used to fire have died ({int(dead.sum())} of {len(dead)} looked at)"
        return Finding(self.name, name, severity, share, message, step=0)
