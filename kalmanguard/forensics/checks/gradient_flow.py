"""Gradient flow: a layer that no longer gets a gradient while others of the same step do."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from kalmanguard.forensics.baseline import Baseline
from kalmanguard.forensics.checks.check import Need
from kalmanguard.forensics.report import Finding, Severity
from kalmanguard.forensics.samples import Sample

_SILENCE_NATS = 8.0
_WARNING, _CRITICAL = math.log(300.0), math.log(1e4)
_MEMORY = 64


@dataclass(slots=True)
class _Layer:
    ratio: Baseline = field(default_factory=lambda: Baseline(floor=0.2))
    seen: int = 0
    present: float = 0.0
    silent: int = 0
    low: int = 0


class GradientFlow:
    """Gradient size of a layer over the median of its peers in the same step, against its own history.

    Dividing by peers of the same step takes out what moves all gradients together (a batch, a schedule, a loss that
    goes to zero). Two ways to fail: no gradient at all (none, or exactly zero), for longer than the share q of steps in
    which the layer used to have one explains, ``-n ln(1 - q) > 8``: three or four samples for a layer that always had
    one, more for one that is skipped at times (stochastic depth, experts); or a ratio that has fallen by more than 300
    (warning) or 10,000 (critical) in two successive samples.

    Notes
    -----
    Guarantee: HEURISTIC. Where every sampled gradient vanishes nothing is said: there is no peer to compare with, and a
    loss that is exactly zero does that in healthy training. Embeddings are left out (rows that do not occur have no
    gradient), frozen parameters have none to lose. Latency: three or four samples of the layer. Cost: one norm of at
    most 4,096 elements a layer.
    """

    name = "gradient_flow"
    needs = frozenset({Need.GRADIENTS})

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    def judge(self, sample: Sample) -> list[Finding]:
        sizes = {
            layer.name: layer.gradient_rms
            for layer in sample.layers
            if layer.gradient_rms is not None and math.isfinite(layer.gradient_rms)
        }
        found = []
        for layer in sample.layers:
            if layer.name not in sizes or not layer.judged:
                continue
            peers = [math.log(size) for name, size in sizes.items() if name != layer.name and size > 0.0]
            if peers:
                known = self._layers.setdefault(layer.name, _Layer())
                found.append(self._judge(layer.name, known, sizes[layer.name], statistics.median(peers)))
        return found

    def forget(self) -> None:
        for layer in self._layers.values():
            layer.silent = layer.low = 0

    def _judge(self, name: str, layer: _Layer, size: float, peers: float) -> Finding:
        if size == 0.0:
            layer.silent += 1
            nats = -layer.silent * math.log1p(-min(layer.present, 1.0 - 0.5 / (layer.seen + 1)))
            severity = Severity.CRITICAL if layer.seen >= 5 and nats > _SILENCE_NATS else Severity.OK
            message = f"no gradient in the last {layer.silent} samples, while other layers have one"
            if severity is Severity.OK:
                self._count(layer, present=False)
            return Finding(self.name, name, severity, 0.0, message)
        layer.silent = 0
        self._count(layer, present=True)
        ratio = math.log(size) - peers
        fallen = -layer.ratio.deviation(ratio) if layer.ratio.ready else 0.0
        limit = max(_WARNING, 6.0 * layer.ratio.spread)
        layer.low = layer.low + 1 if fallen > limit else 0
        if not layer.low:
            layer.ratio.learn(ratio)
        severity = Severity.OK
        if layer.low >= 2:
            severity = Severity.CRITICAL if fallen > max(_CRITICAL, limit) else Severity.WARNING
        message = f"the gradient is {math.exp(min(fallen, 700.0)):.3g} times smaller against other layers than it was"
        return Finding(self.name, name, severity, fallen, message)

    @staticmethod
    def _count(layer: _Layer, *, present: bool) -> None:
        layer.seen += 1
        layer.present += (present - layer.present) / min(layer.seen, _MEMORY)
