"""Paired probe test: per-example losses against those of a fixed reference state."""

from __future__ import annotations

import math

import numpy as np

from kalmanguard.records import Evidence, FloatArray, Guarantee

#: Larger losses have no squares.
_LARGEST = 1e150


def paired_standard_error(losses: FloatArray, reference: FloatArray) -> float:
    """Standard error of the mean of per-example differences, shape ``(n,)`` both; 0 for n = 1: none is known."""
    n = len(losses)
    if n < 2:
        return 0.0
    differences, scale = _differences(losses, reference)
    mean = math.fsum(differences) / n
    return scale * math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)


def _differences(losses: FloatArray, reference: FloatArray) -> tuple[list[float], float]:
    """Differences in a unit in which they have squares, and that unit: 1 but for losses beyond 1e150."""
    largest = max(float(np.abs(losses).max()), float(np.abs(reference).max()))
    scale = largest if largest > _LARGEST else 1.0
    return (losses / scale - reference / scale if scale != 1.0 else losses - reference).tolist(), scale


def paired_test(losses: FloatArray, reference: FloatArray, *, level: float = 1e-6) -> Evidence:
    """One-sided test that the mean held-out loss has risen above the reference state's.

    Parameters
    ----------
    losses, reference
        Per-example losses on the same examples, shape ``(n,)``; the reference was fixed before its own losses were
        seen (the last certified state, not the best of many).
    level
        Significance at which the evidence counts as fired.

    Notes
    -----
    The unit is the example (a sequence, not a token). Large-sample normal test; on a probe that is used again and again
    its guarantee is HEURISTIC: decisions depend on earlier readings of the same examples. Cost: 60 us at n = 128,
    at probes only.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> before = rng.gamma(2.0, 0.5, 128)
    >>> paired_test(before + rng.normal(0.15, 0.2, 128), before).fired
    True
    >>> paired_test(before + rng.normal(0.0, 0.2, 128), before).fired
    False
    """
    n = len(losses)
    differences, scale = _differences(losses, reference)
    difference = scale * (math.fsum(differences) / n)
    error = paired_standard_error(losses, reference)
    z = difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0
    p_value = math.erfc(z / math.sqrt(2.0)) / 2.0
    return Evidence(
        "paired-probe",
        z,
        p_value < level,
        Guarantee.HEURISTIC,
        f"held-out loss changed by {difference:+.4g} on the same {n} examples, {z:+.1f} standard errors",
        p_value=p_value,
    )
