"""Calibration on healthy runs: a corpus of scores, conformal thresholds, adaptive conformal inference, risk control."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kalmanguard.calibration.thresholds import Calibration

__all__ = ["load"]


def load(path: str = "default") -> Calibration:
    """Read a calibration file, or the one that is shipped; see `kalmanguard.calibration.thresholds.load`."""
    from kalmanguard.calibration import thresholds

    return thresholds.load(path)
