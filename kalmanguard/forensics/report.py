"""What forensics reports: findings by layer, how bad, how widespread, and where it is going. Numbers and text only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from kalmanguard.records import Guarantee

#: In place of a layer's name: a finding about the model as a whole.
MODEL = "(model)"
_TOP = 5


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """0, 1 or 2, the worst last."""
        return list(Severity).index(self)


class Trend(StrEnum):
    """Where the sum of all findings has gone over one detection latency."""

    STABLE = "stable"
    WORSENING = "worsening"
    RECOVERING = "recovering"


class Extent(StrEnum):
    """How much of the model is affected: up to 10, 33, 66 % of the monitored layers, or more."""

    NONE = "none"
    ISOLATED = "isolated"
    MODERATE = "moderate"
    WIDESPREAD = "widespread"
    SYSTEMIC = "systemic"

    @classmethod
    def of(cls, affected: int, layers: int) -> Extent:
        """Name the extent of so many affected layers; a single one is always isolated."""
        if affected == 0:
            return cls.NONE
        if affected == 1 < layers:
            return cls.ISOLATED
        limits = ((0.1, cls.ISOLATED), (1 / 3, cls.MODERATE), (2 / 3, cls.WIDESPREAD))
        return next((extent for limit, extent in limits if affected <= limit * layers), cls.SYSTEMIC)


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's word on one layer.

    Attributes
    ----------
    check, layer
        Who says it of what; `MODEL` for the model as a whole.
    severity
        ``ok`` findings withdraw an earlier one, and are not reported.
    statistic
        The number that was judged, in the check's own unit; nan where nothing was to be computed.
    message
        One sentence with the numbers.
    guarantee
        What stands behind the judgement.
    step
        Step at which it was last seen.
    """

    check: str
    layer: str
    severity: Severity
    statistic: float
    message: str
    guarantee: Guarantee = Guarantee.HEURISTIC
    step: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data as JSON knows it; a statistic that is not finite is ``None``."""
        plain = asdict(self)
        plain["severity"], plain["guarantee"] = str(self.severity), str(self.guarantee)
        plain["statistic"] = self.statistic if math.isfinite(self.statistic) else None
        return plain


@dataclass(frozen=True, slots=True)
class Report:
    """The latest known state of the model's layers.

    Attributes
    ----------
    step
        Steps seen so far.
    level
        The worst severity of all findings.
    trend
        Whether findings became more or worse over the last `Forensics.detection_latency_steps`.
    scale, affected_fraction
        How many of the monitored layers have a finding, in words and as a fraction; a finding about the whole model
        counts all of them.
    findings
        All findings in force, the worst first.
    layers
        Number of monitored layers.
    abstained
        What could not be looked at, and why.

    Examples
    --------
    >>> finding = Finding("saturation", "layers.2", Severity.WARNING, 0.7, "70 % of the values are at a bound")
    >>> report = Report.of([finding], step=120, layers=4)
    >>> str(report.level), str(report.scale), report.affected_fraction
    ('warning', 'isolated', 0.25)
    >>> print(report.summary())
    step 120: warning, stable, isolated (1 of 4 layers affected)
      layers.2
        warning   saturation: 70 % of the values are at a bound
    """

    step: int
    level: Severity
    trend: Trend
    scale: Extent
    affected_fraction: float
    findings: tuple[Finding, ...]
    layers: int
    abstained: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        findings: Iterable[Finding],
        *,
        step: int,
        layers: int,
        trend: Trend = Trend.STABLE,
        abstained: tuple[str, ...] = (),
    ) -> Report:
        """Sum up findings about a model with so many monitored layers."""
        bad = [f for f in findings if f.severity is not Severity.OK]
        bad.sort(key=lambda f: (-f.severity.rank, f.check, f.layer))
        affected = layers if any(f.layer == MODEL for f in bad) else len({f.layer for f in bad})
        level = bad[0].severity if bad else Severity.OK
        fraction = min(1.0, affected / layers) if layers else float(bool(bad))
        extent = Extent.of(affected, layers)
        return cls(step, level, trend, extent, fraction, tuple(bad), layers, abstained)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return self.level is Severity.OK

    @property
    def top_layers(self) -> dict[str, tuple[Finding, ...]]:
        """The layers with the worst and most findings (at most five), with these findings."""
        by_layer: dict[str, list[Finding]] = {}
        for finding in self.findings:
            by_layer.setdefault(finding.layer, []).append(finding)
        ranked = sorted(by_layer.items(), key=lambda item: -sum(f.severity.rank**2 for f in item[1]))
        return {layer: tuple(found) for layer, found in ranked[:_TOP]}

    def summary(self) -> str:
        """Plain text for a terminal."""
        affected = round(self.affected_fraction * self.layers)
        lines = [
            f"step {self.step}: {self.level}, {self.trend}, {self.scale} ({affected} of {self.layers} layers affected)"
        ]
        for layer, found in self.top_layers.items():
            lines.append(f"  {layer}")
            lines += [f"    {f.severity:<9} {f.check}: {f.message}" for f in found]
        more = len({f.layer for f in self.findings}) - _TOP
        if more > 0:
            lines.append(f"  and {more} more")
        lines += [f"  not looked at: {reason}" for reason in self.abstained]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data as JSON knows it."""
        return {
            "step": self.step,
            "level": str(self.level),
            "trend": str(self.trend),
            "scale": str(self.scale),
            "affected_fraction": self.affected_fraction,
            "layers": self.layers,
            "findings": [f.to_dict() for f in self.findings],
            "top_layers": {layer: [f.check for f in found] for layer, found in self.top_layers.items()},
            "abstained": list(self.abstained),
        }
