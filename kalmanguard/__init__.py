"""A flight controller for PyTorch training.

Everything public is reached from here and loaded when first used, so that ``import kalmanguard`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kalmanguard.detectors.attribution import AttributionResult, Cause, attribute
    from kalmanguard.engine import Engine
    from kalmanguard.errors import (
        BindError,
        ConfigurationError,
        Intervention,
        JournalError,
        KalmanguardError,
        PauseIntervention,
        RollbackIntervention,
        SnapshotError,
        TrainingHalted,
        VetoIntervention,
    )
    from kalmanguard.faults import FaultInjector
    from kalmanguard.forensics import Forensics
    from kalmanguard.records import Action, Decision, Evidence, Guarantee, Level, Measurement, Mode, ProbeReading
    from kalmanguard.sensors.samples import SampleSignals, sample_signals
    from kalmanguard.settings import Settings
    from kalmanguard.supervisor import Supervisor

    __version__: str

__all__ = [
    "Action",
    "AttributionResult",
    "BindError",
    "Cause",
    "ConfigurationError",
    "Decision",
    "Engine",
    "Evidence",
    "FaultInjector",
    "Forensics",
    "Guarantee",
    "Intervention",
    "JournalError",
    "KalmanguardError",
    "Level",
    "Measurement",
    "Mode",
    "PauseIntervention",
    "ProbeReading",
    "RollbackIntervention",
    "SampleSignals",
    "Settings",
    "SnapshotError",
    "Supervisor",
    "TrainingHalted",
    "VetoIntervention",
    "__version__",
    "attribute",
    "sample_signals",
]

_HOMES = {
    "detectors.attribution": ("AttributionResult", "Cause", "attribute"),
    "engine": ("Engine",),
    "errors": (
        "BindError",
        "ConfigurationError",
        "Intervention",
        "JournalError",
        "KalmanguardError",
        "PauseIntervention",
        "RollbackIntervention",
        "SnapshotError",
        "TrainingHalted",
        "VetoIntervention",
    ),
    "faults": ("FaultInjector",),
    "forensics": ("Forensics",),
    "records": ("Action", "Decision", "Evidence", "Guarantee", "Level", "Measurement", "Mode", "ProbeReading"),
    "sensors.samples": ("SampleSignals", "sample_signals"),
    "settings": ("Settings",),
    "supervisor": ("Supervisor",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("kalmanguard")
    elif name in _MODULE_OF:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
