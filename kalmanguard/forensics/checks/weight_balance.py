"""Weight balance: a layer whose weights grow or shrink unlike its own past and unlike its peers."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from kalmanguard.forensics.baseline import Baseline
from kalmanguard.forensics.checks.check import Need
from kalmanguard.forensics.report import Finding, Severity
from kalmanguard.forensics.samples import Sample

_JUMP_WARNING, _JUMP_CRITICAL, _JUMP_SPREADS = math.log(2.0), math.log(5.0), 8.0
#: Samples after which a size that was jumped to is the new normal.
_ACCEPTED = 4
_DRIFT_WARNING, _DRIFT_CRITICAL = math.log(20.0), math.log(100.0)


@dataclass(slots=True)
class _Layer:
    base: Baseline = field(default_factory=lambda: Baseline(memory=0))
    change: Baseline = field(default_factory=lambda: Baseline(size=4))
    last: float | None = None
    jumped: int = 0
    grown: float = 0.0


class WeightBalance:
    """Change of a layer's weight norm: from one sample to the next, and since its baseline against all other layers.

    ``w`` is the logarithm of the root mean square over the same sampled elements each time, so that sampling adds no
    noise, and how large a layer was initialised plays no part. Jump: ``|w_t - w_{t-1}|`` beyond a factor of 2 (warning)
    or 5 (critical) and beyond 8 times the layer's own usual change; it is accepted after four samples. Drift: ``w``
    since the baseline, minus the median of that over all layers, beyond a factor of 20 (warning) or 100 (critical).

    Notes
    -----
    Guarantee: HEURISTIC. Weights with two or more dimensions only: biases start at zero and may grow by any factor. A
    healthy network does grow layers apart over a long run (a head that was initialised small), hence the wide limits
    for drift. A change that is spread over more steps than the baseline has is seen by the drift alone. Latency: one
    sample of the layer, after four. Cost: one norm of at most 4,096 elements a layer.
    """

    name = "weight_balance"
    needs = frozenset({Need.WEIGHTS})

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    def judge(self, sample: Sample) -> list[Finding]:
        found = []
        for seen in sample.layers:
            if seen.weight_rms is None or not seen.judged:
                continue
            layer = self._layers.setdefault(seen.name, _Layer())
            if not math.isfinite(seen.weight_rms):
                message = "a weight is not finite"
                found.append(Finding(self.name, seen.name, Severity.CRITICAL, seen.weight_rms, message))
            elif seen.weight_rms == 0.0:
                severity = Severity.CRITICAL if layer.last is not None else Severity.OK
                found.append(Finding(self.name, seen.name, severity, 0.0, "all weights have become zero"))
            else:
                found.append(self._judge(seen.name, layer, math.log(seen.weight_rms)))
        return found

    def forget(self) -> None:
        for layer in self._layers.values():
            layer.last = None

    def _judge(self, name: str, layer: _Layer, size: float) -> Finding:
        jump = 0.0 if layer.last is None else size - layer.last
        usual = layer.change
        severity, statistic = Severity.OK, jump
        message = f"the weights changed by a factor of {math.exp(jump):.3g} since the last normal sample"
        if usual.ready and abs(jump) > max(_JUMP_WARNING, _JUMP_SPREADS * (usual.level + usual.spread)):
            severity = Severity.CRITICAL if abs(jump) > _JUMP_CRITICAL else Severity.WARNING
            layer.jumped += 1
        else:
            usual.learn(abs(jump))
            layer.jumped = 0
        if layer.jumped in (0, _ACCEPTED):
            layer.last, layer.jumped = size, 0
        layer.base.learn(size)
        if not layer.base.ready:
            return Finding(self.name, name, severity, statistic, message)
        layer.grown = layer.base.deviation(size)
        others = [other.grown for other in self._layers.values() if other is not layer and other.base.ready]
        drift = layer.grown - (statistics.median(others) if others else 0.0)
        if severity is Severity.OK and abs(drift) > _DRIFT_WARNING:
            severity = Severity.CRITICAL if abs(drift) > _DRIFT_CRITICAL else Severity.WARNING
            statistic = drift
            message = f"the weights changed by a factor of {math.exp(drift):.3g} against those of the other layers"
        return Finding(self.name, name, severity, statistic, message)
