"""What watches a run: nothing, kalmanguard, published rules rewritten from their description, and installed peers."""

from __future__ import annotations

from benchmarks.guards.clipping import Clipping, ZClip
from benchmarks.guards.frameworks import KillLossSpike, RerunChecks, SkipStep
from benchmarks.guards.guard import Event, Guard
from benchmarks.guards.own import Kalmanguard, WithDynamics, WithForensics, variants
from benchmarks.guards.peers import Arc, Argus, arc_version, argus_version
from benchmarks.guards.published import AliasedProbeGate, ProbeGate, TightAliasedProbeGate, TightProbeGate
from benchmarks.guards.zscore import LossZScore, ZScore
from kalmanguard.models import Plant

__all__ = ["GUARDS", "Event", "Guard", "available", "make_guard", "missing"]

#: Guards by the name that tables use.
GUARDS: dict[str, type[Guard]] = {
    "none": Guard,
    "kalmanguard": Kalmanguard,
    "kalmanguard, dynamics": WithDynamics,
    "kalmanguard, forensics": WithForensics,
    "z-score": ZScore,
    "clipping": Clipping,
    "ARC": Arc,
    "Or": ProbeGate,
    "Or, aliased": AliasedProbeGate,
    "Or, eps 0.1": TightProbeGate,
    "Or, eps 0.1, aliased": TightAliasedProbeGate,
    "ZClip": ZClip,
    "OLMo-core": SkipStep,
    "Megatron": RerunChecks,
    "LLM-foundry": KillLossSpike,
    "loss z-score": LossZScore,
    "Argus": Argus,
}


def missing() -> dict[str, str]:
    """Guards whose package is not installed, with the sentence that says so."""
    versions = {"ARC": (arc_version(), "arc-training"), "Argus": (argus_version(), "plarv-argus-sdk")}
    return {
        name: f"The peer {name} ({package}) is not installed, so it is not in the tables."
        for name, (version, package) in versions.items()
        if version is None
    }


def available() -> list[str]:
    """Names of the guards that can be used here, in the order of the tables."""
    absent = missing()
    return [name for name in GUARDS if name not in absent]


def make_guard(name: str, plant: Plant) -> Guard:
    """Make a guard by the name that tables use; ``kalmanguard: NAME`` is a variant of `benchmarks.guards.own`."""
    if name.startswith("kalmanguard: "):
        return Kalmanguard(plant, **variants()[name.removeprefix("kalmanguard: ")])
    return GUARDS[name](plant)
