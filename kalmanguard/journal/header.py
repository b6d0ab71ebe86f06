"""The journal's first record: everything that is fixed before any data is seen."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from kalmanguard.certificate.betting import LAMBDA_RULE, STAKE
from kalmanguard.control.ladder import RUNGS
from kalmanguard.control.retention import MOST_SLOTS
from kalmanguard.engine import STATISTICS
from kalmanguard.settings import Settings


def header(settings: Settings, recovery: dict[str, object], model: Any, examples: int, digest: str) -> dict[str, Any]:
    """Describe a run: settings, recovery ladder, the certificate's constants, probe set, model, environment."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "format": 1,
        "settings": settings.model_dump(mode="json"),
        "recovery": recovery,
        "statistics": list(STATISTICS),
        "certificate": {
            "alpha": settings.certificate_alpha,
            "delta": settings.certificate_delta,
            "clip": settings.certificate_clip,
            "lambda_rule": LAMBDA_RULE,
            "c": STAKE,
            # What a probe's bit of information can set off: any slot on any rung.
            "kinds": RUNGS * (MOST_SLOTS + 1),
        },
        "probe": {"n": examples, "digest": digest},
        "model": {
            "type": type(model).__name__,
            "parameters": sum(n for n, _ in sizes),
            "trainable": sum(n for n, trained in sizes if trained),
        },
        "environment": environment(),
    }


def environment() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
    for name in ("kalmanguard", "torch"):
        module = sys.modules.get(name)
        try:
            found[name] = str(getattr(module, "__version__", None) or version(name))
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
