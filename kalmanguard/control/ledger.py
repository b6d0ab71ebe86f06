"""The ledger: what no rollback rewinds, or rolling back would be forgetting why."""

from __future__ import annotations

import math
from typing import NamedTuple

from kalmanguard.control.cadence import Cadence
from kalmanguard.control.ladder import LadderState
from kalmanguard.control.retention import Slot
from kalmanguard.detectors.drift import DriftState
from kalmanguard.detectors.dynamics import DynamicsState
from kalmanguard.detectors.excursion import ExcursionState
from kalmanguard.detectors.fusion import FusionState
from kalmanguard.detectors.tail import TailState
from kalmanguard.estimators.bank import CHANNELS
from kalmanguard.records import Innovation, Mode


class Episode(NamedTuple):
    """One stretch of suspicion: when it began, whether an innovation explains it, what its probes said, when to look.

    ``drifted``: the drift test has alarmed, and no rise of the learning rate accounts for it. ``first``, ``worst`` and
    ``excess`` are how far above the best level the first, the worst and the last of ``broken`` probes lay; ``rising``
    counts probes in a row that were each above the one before. ``tails`` are the thresholds from before the episode: an
    alarm that proves right does not raise them; ``gradient`` is the largest gradient norm from before it.
    """

    onset: int
    last: int
    explained: bool
    drifted: bool = False
    broken: int = 0
    first: float = math.inf
    worst: float = 0.0
    excess: float = math.inf
    rising: int = 0
    y: float = math.inf
    next_probe: int = 0
    gap: int = 1
    tails: tuple[TailState, ...] | None = None
    gradient: float = math.inf


class Heard(NamedTuple):
    """A sensor that tells nothing new before step ``until``; ``gap`` is how long it was not listened to last time."""

    sensor: str
    until: int
    gap: int


class Ledger(NamedTuple):
    """What no rollback rewinds.

    ``start_error`` is the standard error of the first probe's own mean.
    ``began`` is the step before the first one of the present objective, ``first_loss`` the first training loss of it.
    ``recent`` are the innovations of the last steps since a restored state, from which an onset is read.
    """

    mode: Mode = Mode.WATCHING
    warm: bool = False
    cadence: Cadence | None = None
    capacity: int = 2
    objective: int = 0
    start: float = math.nan
    best: float = math.inf
    standard_error: float = 0.0
    probes: int = 0
    last_probe: int = -1
    last_accepted: int = -1
    last_snapshot: int = -1
    episode: Episode | None = None
    declined: bool = False
    proposed: bool = False
    target: int = -1
    slots: tuple[Slot, ...] = ()
    tails: tuple[TailState, ...] = (TailState(),) * len(CHANNELS)
    drift: DriftState = DriftState()
    excursion: ExcursionState = ExcursionState()
    lowest_loss: float = math.inf
    rate: float = 0.0
    ladder: LadderState = LadderState()
    skipped_in_a_row: int = 0
    tampered: int = 0
    lapsed: int = 0
    last_y: float = math.inf
    climbed: int = 0
    began: int = 0
    first_loss: float = math.nan
    heard: tuple[Heard, ...] = ()
    recent: tuple[tuple[Innovation | None, ...], ...] = ()
    dynamics: DynamicsState = DynamicsState()
    fusion: FusionState = FusionState()
    start_error: float = 0.0


def restarted(ledger: Ledger, objective: int, began: int) -> Ledger:
    """A new objective: what was gained on the old one no longer binds."""
    return ledger._replace(
        objective=objective, began=began, warm=False, start=math.nan, best=math.inf, standard_error=0.0, probes=0,
        episode=None, declined=False, slots=(), last_snapshot=-(1 << 40), drift=DriftState(), lowest_loss=math.inf,
        first_loss=math.nan, recent=(), dynamics=DynamicsState(), fusion=FusionState(),
        ladder=LadderState(), mode=Mode.WATCHING,
    )  # fmt: skip
