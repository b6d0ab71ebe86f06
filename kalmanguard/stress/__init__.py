"""Stress tests: how much of what a model has learned it keeps when it, its training and its data are disturbed."""

from __future__ import annotations

from kalmanguard.stress.records import CriticalPoint, Curve, Layer, Recommendation
from kalmanguard.stress.report import DEFINITION, StressReport
from kalmanguard.stress.stress import KINDS, stress

__all__ = ["DEFINITION", "KINDS", "CriticalPoint", "Curve", "Layer", "Recommendation", "StressReport", "stress"]
