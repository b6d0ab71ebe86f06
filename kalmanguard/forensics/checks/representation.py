"""Representation collapse: features that no longer tell examples apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from kalmanguard.forensics.baseline import Baseline
from kalmanguard.forensics.checks.check import Need
from kalmanguard.forensics.report import Finding, Severity
from kalmanguard.forensics.samples import Array, Sample

_FEWEST_ROWS, _UNITS = 4, 256
_RANK_FRAC, _LOW_RANK = 0.25, 1.5
_VARIED_WARNING, _VARIED_CRITICAL = 0.02, 0.002


@dataclass(slots=True)
class _Layer:
    rank: Baseline = field(default_factory=Baseline)
    varied: Baseline = field(default_factory=Baseline)


class Representation:
    """How much of a layer's input differs between rows (examples, positions), and in how many directions.

    With G the Gram matrix of the centred rows, the varied share is ``tr G / sum x^2`` and the effective rank the
    participation ratio ``(tr G)^2 / ||G||^2``, between 1 and the number of rows minus one. A warning when the varied
    share falls below 2 % of its baseline, or the effective rank below a quarter of its own and below 1.5; critical
    when the varied share falls below 0.2 %.

    Notes
    -----
    Guarantee: HEURISTIC. The baseline follows the run slowly: a network that learns to tell ten classes apart and
    nothing else loses rank for good reason. Needs four rows; with fewer nothing is said. 64 rows and 256 units are
    looked at. Latency: one sample of the layer, after 5. Cost: one product of 64 x 256 by its transpose.
    """

    name = "representation"
    needs = frozenset({Need.FEATURES})

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    def judge(self, sample: Sample) -> list[Finding]:
        found = []
        for seen in sample.layers:
            if seen.features is None or not seen.judged or len(seen.features.rows) < _FEWEST_ROWS:
                continue
            measured = spread_of(seen.features.rows)
            if measured is not None:
                found.append(self._judge(seen.name, *measured))
        return found

    def forget(self) -> None:
        """Nothing to forget: baselines hold for the run."""

    def _judge(self, name: str, varied: float, rank: float) -> Finding:
        layer = self._layers.setdefault(name, _Layer())
        share = varied / layer.varied.level if layer.varied.ready and layer.varied.level > 0.0 else 1.0
        fallen = rank < min(_LOW_RANK, _RANK_FRAC * layer.rank.level) if layer.rank.ready else False
        if share < _VARIED_WARNING:
            severity = Severity.CRITICAL if share < _VARIED_CRITICAL else Severity.WARNING
            message = f"rows are nearly alike: {varied:.2g} of their size varies, {layer.varied.level:.2g} did before"
            return Finding(self.name, name, severity, share, message)
        if fallen:
            message = f"features vary in {rank:.1f} directions, in {layer.rank.level:.1f} before"
            return Finding(self.name, name, Severity.WARNING, rank, message)
        layer.varied.learn(varied)
        layer.rank.learn(rank)
        return Finding(self.name, name, Severity.OK, share, "features tell examples apart")


def spread_of(rows: Array) -> tuple[float, float] | None:
    """Varied share and effective rank of rows ``(n, units)``; ``None`` where they are zero or not finite.

    Examples
    --------
    >>> varied, rank = spread_of(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    >>> varied, rank
    (1.0, 2.0)
    """
    largest = float(np.abs(rows).max())
    if not 0.0 < largest < math.inf:
        return None
    values = rows[:, :_UNITS] / largest
    centred = values - values.mean(axis=0)
    gram = centred @ centred.T
    size, trace = float(np.square(values).sum()), float(np.trace(gram))
    # What is left of equal rows after rounding is no direction.
    if trace <= 1e-12 * size:
        return 0.0, 1.0
    return trace / size, trace * trace / float(np.square(gram).sum())
