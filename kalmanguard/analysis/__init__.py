"""Offline: trajectories read, smoothed, identified, judged again."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kalmanguard.analysis.analysis import Analyses, Analysis, analyze
    from kalmanguard.analysis.comparison import Comparison, compare
    from kalmanguard.analysis.health import Health, Verdict, verdict
    from kalmanguard.analysis.judgement import Event, Judge, Judgement, judge
    from kalmanguard.analysis.report import write_report
    from kalmanguard.analysis.trajectory import Trajectory
    from kalmanguard.analysis.variants import Sweep, WhatIf, grid, sweep, whatif

_HOMES = {
    "analysis": ("Analyses", "Analysis", "analyze"),
    "comparison": ("Comparison", "compare"),
    "health": ("Health", "Verdict", "verdict"),
    "judgement": ("Event", "Judge", "Judgement", "judge"),
    "report": ("write_report",),
    "trajectory": ("Trajectory",),
    "variants": ("Sweep", "WhatIf", "grid", "sweep", "whatif"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Analyses",
    "Analysis",
    "Comparison",
    "Event",
    "Health",
    "Judge",
    "Judgement",
    "Sweep",
    "Trajectory",
    "Verdict",
    "WhatIf",
    "analyze",
    "compare",
    "grid",
    "judge",
    "sweep",
    "verdict",
    "whatif",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
