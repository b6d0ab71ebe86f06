"""How often to probe and to snapshot: from measured costs and a stated budget, frozen after warm-up."""

from __future__ import annotations

import math
from typing import NamedTuple

from kalmanguard.records import Costs
from kalmanguard.settings import Settings

_LONGEST_PROBE = 399
_LONGEST_SNAPSHOT = 50


class Cadence(NamedTuple):
    """Steps between probes, and between snapshots."""

    probe_every: int
    snapshot_every: int


def cadence(settings: Settings, costs: Costs | None) -> Cadence:
    """Spend half of ``settings.budget`` on probes and half on snapshots, at most; a user's own cadence wins.

    The snapshot interval is Young's first-order optimum ``sqrt(2 * cost / rate)`` for a snapshot that costs as many
    steps and faults of the prior rate, where the budget allows it. Probe intervals are odd: an even spacing cannot see
    an oscillation of period two.

    References
    ----------
    Young, CACM 17 (1974), equation 3; Daly, FGCS 22 (2006).

    Examples
    --------
    >>> cadence(Settings(), Costs(step_s=0.1, probe_s=0.02, snapshot_s=0.004, slots=4))
    Cadence(probe_every=41, snapshot_every=20)
    """
    if costs is None:
        probe_every, snapshot_every = 11, 10
    else:
        step_s = max(costs.step_s, 1e-9)
        share = settings.budget / 2.0
        probe_every = math.ceil(costs.probe_s / step_s / share)
        probe_every = min(max(probe_every, 5), _LONGEST_PROBE) | 1
        cost = costs.snapshot_s / step_s
        snapshot_every = max(math.ceil(math.sqrt(2.0 * cost / settings.fault_rate)), math.ceil(cost / share), 5)
        snapshot_every = min(snapshot_every, max(_LONGEST_SNAPSHOT, math.ceil(cost / share)))
    return Cadence(settings.probe_every or probe_every, settings.snapshot_every or snapshot_every)
