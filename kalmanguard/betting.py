"""The betting test of claim C3: present state against the best certified one, on examples that were never used."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from kalmanguard.certificate.betting import BettingTest, alpha_t
from kalmanguard.loop import Loop


def bet_on_fresh_examples(loop: Loop, fresh: Iterable[Any] | None) -> None:
    """Measure both states on unused examples and journal the bet; does nothing when there is nothing to bet with.

    The anchor is the best certified state by the reused probe, so it is fixed before any of the fresh losses is seen.
    The training state is put back bit for bit, random states and schedule included.
    """
    held = loop.actuator.ring.steps()
    certified = [s for s in loop.state.ledger.slots if s.certified and s.step in held]
    if not certified or (fresh is None and not loop.probe.fresh_left):
        return
    batches = loop.probe.take_fresh(fresh)
    if not batches:
        return
    reference = min(certified, key=lambda s: s.level).step
    candidate = loop.probe.read_fresh(batches)
    state, present = loop.actuator.state, loop.actuator.state.capture()
    try:
        loop.actuator.ring.restore(reference, rng=False, schedule=False, data=False)
        anchor = loop.probe.read_fresh(batches)
    finally:
        state.restore(present, rng=True, schedule=True, data=False)
    loop.suite.interrupt()
    settings = loop.settings
    loop.tally["bets"] += 1
    level = alpha_t(settings.certificate_alpha, loop.tally["bets"])
    test = BettingTest(delta=settings.certificate_delta, clip=settings.certificate_clip, alpha=level)
    # What is not finite is as bad as the clip allows.
    differences = np.nan_to_num(candidate - anchor, nan=math.inf)
    test.update_all(differences)
    record = {
        "reference_step": reference,
        "index": loop.tally["bets"],
        "alpha_t": level,
        "log_wealth": test.log_wealth,
        "certified": test.rejects,
        "first": loop.tally["fresh_examples"],
    }
    loop.journal.record("fresh", loop.step, record, np.asarray(differences, dtype="<f8").tobytes())
    loop.tally["fresh_examples"] += len(differences)
