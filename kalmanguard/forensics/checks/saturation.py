"""Saturation: bounded activations at their bounds, and magnitudes close to the largest number of their dtype."""

from __future__ import annotations

import numpy as np

from kalmanguard.forensics.baseline import Baseline
from kalmanguard.forensics.checks.check import Need
from kalmanguard.forensics.report import Finding, Severity
from kalmanguard.forensics.samples import Array, Features, LayerSample, Sample

_NEAR = 0.01
_WARNING_FRAC, _CRITICAL_FRAC, _GROWTH = 0.5, 0.9, 0.25
#: Powers of two below the dtype's largest number.
_HEADROOM = 8.0


class Saturation:
    """Share of values within 1 % of a bound, against what it was when the layer was first looked at.

    A layer's input is taken for bounded when every value lies in [-1, 1]; the bounds are then -1 and 1, and 0 as well
    when none is negative, unless zeros were there from the start (a rectifier's zero is no bound). A warning when more
    than half of the values are there and that is 25 points more than at first; critical at 90 %. Independently of
    bounds: a warning for a magnitude beyond an eighth of the dtype's largest number (8,188 in float16), critical when
    one is not finite.

    Notes
    -----
    Guarantee: HEURISTIC. Sees sigmoid and tanh however they are called, as long as a layer with a weight matrix
    follows; the model's last activation is not judged, since an output that reaches its bounds has learned. A
    binary-valued input from the data is at its bounds from the start, and so never grows. Latency: one sample of the
    layer, after a baseline of 5.
    """

    name = "saturation"
    needs = frozenset({Need.FEATURES})

    def __init__(self) -> None:
        self._baselines: dict[str, Baseline] = {}
        self._rectified: set[str] = set()

    def judge(self, sample: Sample) -> list[Finding]:
        return [
            self._of(layer, layer.features) for layer in sample.layers if layer.features is not None and layer.judged
        ]

    def forget(self) -> None:
        """Nothing to forget: a baseline of shares holds for the run."""

    def _of(self, layer: LayerSample, features: Features) -> Finding:
        rows = features.rows
        low, high = float(rows.min()), float(rows.max())
        largest = max(-low, high)
        # A comparison with nan is false.
        if not largest < np.inf:
            message = "an activation is not finite"
            return Finding(self.name, layer.name, Severity.CRITICAL, largest, message)
        if largest > features.largest_number / _HEADROOM:
            message = f"activations reach {largest:.3g}; their dtype ends at {features.largest_number:.3g}"
            return Finding(self.name, layer.name, Severity.WARNING, largest / features.largest_number, message)
        baseline = self._baselines.setdefault(layer.name, Baseline(memory=0))
        if not baseline.ready and bool((rows == 0.0).mean() > _NEAR):
            self._rectified.add(layer.name)
        share = _at_bounds(rows, low, high, lower=0.0 if layer.name not in self._rectified else -1.0)
        if not baseline.ready:
            baseline.learn(share)
        grown = baseline.deviation(share) > _GROWTH and baseline.ready
        severity = Severity.OK
        if grown and share > _WARNING_FRAC:
            severity = Severity.CRITICAL if share > _CRITICAL_FRAC else Severity.WARNING
        message = f"{share:.0%} of the activations are at a bound, {baseline.level:.0%} were at first"
        return Finding(self.name, layer.name, severity, share, message)


def _at_bounds(rows: Array, low: float, high: float, *, lower: float) -> float:
    if low < -1.0 or high > 1.0:
        return 0.0
    at = np.abs(rows) > 1.0 - _NEAR
    if low >= lower == 0.0:
        at |= rows < _NEAR
    return float(at.mean())
