"""Harm: what a run lost against its clean twin, over its whole length."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.benchmark import Result


def lost_steps(run: Result, clean: Result, *, since: int) -> float:
    """Sum over steps of the share of the clean twin's progress that the run lacks, from ``since`` on.

    With true losses ``y_t`` of the run, ``c_t`` of its twin and ``y_0`` at the start, step ``t`` counts
    ``min(1, max(0, (y_t - c_t) / (y_0 - c_t)))``; 1 where ``y_t`` is not finite. Between measured steps it is
    interpolated. What was put back in a step counts, not what was undone; a run that halted keeps its last state, while
    its twin goes on.

    Parameters
    ----------
    run, clean
        Results of `benchmarks.flight.fly` with ``truth`` measured at the same steps, that of the start included.
    since
        The first step that counts.
    """
    judged = dict(map(tuple, run["truth_judged"]))
    present: dict[int, Any] = {t: judged.get(t, y) for t, y in run["truth"]}
    start = clean["truth"][0][1]
    steps, shares = [], []
    for t, twin in clean["truth"]:
        if t >= since:
            loss = present.get(t, run["truth_end"]) if t <= run["ended"] else run["truth_end"]
            gained = start - twin
            share = 1.0 if loss is None else (loss - twin) / gained if gained > 0 else 0.0
            steps.append(t)
            shares.append(min(1.0, max(0.0, share)))
    if not steps:
        return 0.0
    between = zip(steps, steps[1:], shares, shares[1:], strict=False)
    return shares[0] + math.fsum((b - a) * (x + y) / 2 for a, b, x, y in between)
