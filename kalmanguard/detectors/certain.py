"""Evidence that needs no statistics: values that are not finite, and edits between optimizer steps."""

from __future__ import annotations

import math

from kalmanguard.records import OVERWRITE, Evidence, Guarantee, Measurement


def certain(m: Measurement, *, habitual: bool = False) -> list[Evidence]:
    """Everything of the kind in one measurement; ``habitual`` leaves out edits, which the user's own code makes."""
    found = []
    if m.veto in ("nonfinite", "explosion"):
        what = (
            "the gradient is not finite"
            if m.veto == "nonfinite"
            else f"the gradient norm {m.gradient_norm:.4g} is beyond the gate"
        )
        guarantee = Guarantee.EXACT if m.veto == "nonfinite" else Guarantee.HEURISTIC
        statistic = m.gradient_norm if m.gradient_norm is not None else math.nan
        found.append(Evidence("gradient-gate", statistic, True, guarantee, what))
    if m.loss is not None and not math.isfinite(m.loss):
        found.append(Evidence("loss-finite", m.loss, True, Guarantee.EXACT, "the training loss is not finite"))
    if not m.parameters_finite:
        found.append(Evidence("parameters-finite", math.nan, True, Guarantee.EXACT, "a parameter is not finite"))
    found.extend(
        Evidence("integrity", 1.0, True, Guarantee.EXACT, f"{what.removeprefix('silent ')} changed without a step")
        for what in (() if habitual else edits(m))
    )
    return found


def edits(m: Measurement) -> tuple[str, ...]:
    """What changed between two optimizer steps without the optimizer."""
    return tuple(t for t in m.tampered if t != OVERWRITE) if m.tampered else ()
