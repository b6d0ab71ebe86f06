"""Layer forensics: which layer is going wrong, and how, from a few layers at a time."""

from __future__ import annotations

from kalmanguard.forensics.forensics import Forensics
from kalmanguard.forensics.report import Extent, Finding, Report, Severity, Trend

__all__ = ["Extent", "Finding", "Forensics", "Report", "Severity", "Trend"]
