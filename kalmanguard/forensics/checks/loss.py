"""Loss spike: a training loss far above its trend that is not one hard batch."""

from __future__ import annotations

import math
import statistics
from collections import deque

from kalmanguard.estimators.trend import TrendFilter, TrendState
from kalmanguard.forensics.checks.check import Need
from kalmanguard.forensics.report import MODEL, Finding, Severity
from kalmanguard.forensics.samples import Sample

_WINDOW, _MEMORY, _WARMUP = 5, 256, 20
_DEVIATIONS, _CRITICAL_DEVIATIONS = 8.0, 40.0
_BEYOND_FRAC, _FLASH = 0.5, 2.0


class LossSpike:
    """The median of the last five losses against its trend, and against the largest that the run has shown.

    Fires when the median lies more than 8 standard deviations of the trend's innovations above its prediction and
    beyond all of the last 256 losses by half of their range (critical at 40 deviations). One batch alone fires only
    when its loss lies beyond the largest loss so far by twice the range of all losses. A loss that is not finite is
    critical at once. A loss that stays up for 256 steps is the new normal.

    Notes
    -----
    Guarantee: HEURISTIC. A hard batch is no instability, and noisy losses near zero are full of them: their size is
    what the range of the run is for. A spike that is smaller than the run's own worst batch is not seen. Latency: three
    steps, one for a very large or non-finite loss. Without a loss nothing is judged. Cost: 5 us a step.
    """

    name = "loss_spike"
    needs: frozenset[Need] = frozenset()

    def __init__(self) -> None:
        self._filter = TrendFilter("loss", floor_frac=1e-4)
        self._begin()

    def _begin(self) -> None:
        self._trend = TrendState()
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._losses: deque[float] = deque(maxlen=_MEMORY)
        self._lowest, self._highest = math.inf, -math.inf
        self._seen = self._since = 0

    def judge(self, sample: Sample) -> list[Finding]:
        loss = sample.loss
        if loss is None:
            return []
        if not math.isfinite(loss):
            return [Finding(self.name, MODEL, Severity.CRITICAL, math.nan, f"the loss is {loss}")]
        self._seen += 1
        finding = self._flash(loss)
        # What leaves the window without a finding was normal: what is still in it must not be its own yardstick.
        normal = self._recent[0] if len(self._recent) == _WINDOW else None
        self._recent.append(loss)
        if normal is not None:
            finding = self._rise(statistics.median(self._recent)) or finding
        if finding is None:
            self._since = 0
            if normal is not None:
                self._losses.append(normal)
                self._lowest, self._highest = min(self._lowest, normal), max(self._highest, normal)
            return [Finding(self.name, MODEL, Severity.OK, 0.0, "the loss follows its trend")]
        self._since += 1
        if self._since >= _MEMORY:
            self._begin()
        return [finding]

    def forget(self) -> None:
        self._begin()

    def _flash(self, loss: float) -> Finding | None:
        height = self._highest - self._lowest
        if self._seen <= _WARMUP + _WINDOW or loss <= self._highest + _FLASH * max(height, 1e-3 * abs(self._highest)):
            return None
        message = f"the loss is {loss:.4g}, and has never been above {self._highest:.4g}"
        return Finding(self.name, MODEL, Severity.WARNING, loss, message)

    def _rise(self, level: float) -> Finding | None:
        trend, innovation = self._filter.step(self._trend, level)
        z = innovation.normalised
        highest = math.inf
        if self._seen > _WARMUP and z > _DEVIATIONS:
            highest = max(self._losses, default=math.inf)
            lowest = min(self._losses, default=0.0)
        if highest == math.inf or level <= highest + _BEYOND_FRAC * (highest - lowest):
            self._trend = trend
            return None
        # The trend does not learn from a spike, so that it goes on while the loss stays there.
        severity = Severity.CRITICAL if z > _CRITICAL_DEVIATIONS else Severity.WARNING
        message = f"the loss rose to {level:.4g}, {z:.0f} deviations above its trend; {highest:.4g} was the most lately"
        return Finding(self.name, MODEL, severity, z, message)
