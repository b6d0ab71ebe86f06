"""The checks, one file each, behind the protocol `Check`."""

from __future__ import annotations

from kalmanguard.forensics.checks.attention import AttentionHealth
from kalmanguard.forensics.checks.check import Check, Need
from kalmanguard.forensics.checks.corruption import Corruption
from kalmanguard.forensics.checks.dead_units import DeadUnits
from kalmanguard.forensics.checks.gradient_flow import GradientFlow
from kalmanguard.forensics.checks.loss import LossSpike
from kalmanguard.forensics.checks.optimizer_state import OptimizerState
from kalmanguard.forensics.checks.precision import Precision
from kalmanguard.forensics.checks.representation import Representation
from kalmanguard.forensics.checks.saturation import Saturation
from kalmanguard.forensics.checks.weight_balance import WeightBalance

__all__ = [
    "AttentionHealth",
    "Check",
    "Corruption",
    "DeadUnits",
    "GradientFlow",
    "LossSpike",
    "Need",
    "OptimizerState",
    "Precision",
    "Representation",
    "Saturation",
    "WeightBalance",
    "default_checks",
]


def default_checks() -> tuple[Check, ...]:
    """One new instance of every check."""
    return (
        DeadUnits(),
        Saturation(),
        GradientFlow(),
        WeightBalance(),
        OptimizerState(),
        AttentionHealth(),
        Representation(),
        Precision(),
        Corruption(),
        LossSpike(),
    )
