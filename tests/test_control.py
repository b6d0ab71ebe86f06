"""Envelope, ladder, retention and cadence: each theorem of a docstring, with hypothesis as the adversary.

Oracles: the statements themselves, checked on arbitrary sequences (no tolerance but rounding), Young's formula, and
brute force over small rings.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kalmanguard.control import cadence as cadence_module
from kalmanguard.control.cadence import Cadence, cadence
from kalmanguard.control.envelope import EnvelopeRule
from kalmanguard.control.ladder import RUNGS, Ladder, LadderState
from kalmanguard.control.retention import CANDIDATES, Slot, to_evict
from kalmanguard.records import Costs
from kalmanguard.settings import Settings

# -- envelope ---------------------------------------------------------------------------------------------------------

losses = st.floats(-100, 100)


@given(
    losses,
    st.lists(st.tuples(losses, st.floats(0, 5)), min_size=1, max_size=100),
    st.floats(0.01, 1.0),
    st.floats(0.1, 5.0),
    st.floats(1e-4, 0.2),
)
def test_no_sequence_of_accepted_probes_leaves_the_best_by_more_than_d(
    start: float, probes: list[tuple[float, float]], phi: float, errors: float, floor: float
) -> None:
    """The ratchet: y <= y_best + D for every accepted probe, however many there are and whatever lies between."""
    rule = EnvelopeRule(give_back=phi, standard_errors=errors, floor_frac=floor)
    best, largest = start, 0.0
    for y, standard_error in probes:
        envelope = rule.of(start, best, standard_error)
        largest = max(largest, envelope.allowance)
        if y <= envelope.bound:
            assert y <= best + largest
            # So with phi <= 1 no accepted probe lies above the start by more than the two floors, whatever came before.
            assert y <= max(start, best + max(errors * standard_error, floor * abs(best))) + 1e-9
            best = min(best, y)
    assert best <= start


def test_the_plain_rule_creeps_where_the_ratchet_does_not() -> None:
    """Or 2026, theorem 7.3: accepting y <= yhat + eps alone lets the loss climb by eps at every probe."""
    rule = EnvelopeRule(give_back=0.2, standard_errors=4.0, floor_frac=0.01)
    start, best, step = 2.0, 1.0, 0.05
    bound = rule.of(start, best, 0.01).bound
    creeping = [best + step * t for t in range(1, 200)]
    # Each of them is within eps of the one before, so the plain rule would accept them all, up to 10 above the best.
    assert max(b - a for a, b in pairwise(creeping)) < 1.001 * step
    accepted = [y for y in creeping if y <= bound]
    assert max(accepted) <= 1.2 + 1e-12


@given(losses, losses, st.floats(0, 5), st.floats(0.01, 1.0), st.floats(1e-3, 1e3))
def test_allowance_has_the_units_of_the_loss(start: float, best: float, error: float, phi: float, unit: float) -> None:
    rule = EnvelopeRule(give_back=phi, standard_errors=4.0, floor_frac=0.01)
    plain, scaled = rule.of(start, best, error), rule.of(unit * start, unit * best, unit * error)
    assert scaled.allowance == pytest.approx(unit * plain.allowance, rel=1e-9, abs=1e-12 * unit)


@given(losses, losses, st.floats(0, 5))
def test_allowance_is_the_largest_of_its_three_parts(start: float, best: float, error: float) -> None:
    envelope = EnvelopeRule(give_back=0.2, standard_errors=3.0, floor_frac=0.01).of(start, best, error)
    assert envelope.allowance == max(0.2 * (start - best), 3.0 * error, 0.01 * abs(best))
    assert envelope.allowance >= 0
    inner = EnvelopeRule(give_back=0.2, standard_errors=3.0, floor_frac=0.01).of(start, best, error, share=0.25)
    assert inner.allowance <= envelope.allowance or start < best


def test_losses_may_be_zero_or_negative() -> None:
    rule = EnvelopeRule(give_back=0.2, standard_errors=4.0, floor_frac=0.01)
    envelope = rule.of(0.0, -50.0, 0.0)
    assert envelope.bound == pytest.approx(-40.0)
    assert envelope.give_back(-50.0) == 0.0
    assert envelope.give_back(-45.0) == pytest.approx(0.1)
    assert envelope.give_back(0.0) == pytest.approx(1.0)


def test_give_back_without_progress_is_infinite_above_the_best_and_zero_below() -> None:
    envelope = EnvelopeRule(give_back=0.2, standard_errors=4.0, floor_frac=0.01).of(1.0, 1.0, 0.0)
    assert envelope.give_back(1.5) == math.inf
    assert envelope.give_back(0.5) == 0.0


# -- ladder -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 50), st.lists(st.integers(0, 3000), min_size=1, max_size=200))
def test_no_sequence_of_faults_gets_more_rollbacks_than_the_budget(
    budget: int, recovery_steps: int, gaps: list[int]
) -> None:
    ladder, state, step, rungs = Ladder(budget=budget, recovery_steps=recovery_steps), LadderState(), 100, []
    halted = False
    for gap in gaps:
        step += gap
        rung = ladder.rung(state, step)
        if rung is None:
            halted = True
            break
        rungs.append(rung)
        before = state
        state = ladder.climb(state, step, 1.0, 0)
        assert before.score < state.score <= budget
        assert state.hold >= recovery_steps
    assert len(rungs) <= budget
    assert rungs == sorted(rungs)
    assert all(0 <= rung < RUNGS for rung in rungs)
    if len(gaps) > budget:
        assert halted


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 500)), min_size=1, max_size=300))
def test_only_a_quiet_stretch_lowers_the_score(events: list[tuple[bool, int]]) -> None:
    ladder, state, step, since = Ladder(budget=16, recovery_steps=25), LadderState(), 0, 0
    for harmed, gap in events:
        step += gap
        if harmed:
            if ladder.rung(state, step) is None:
                break
            state, since = ladder.climb(state, step, 1.0, 0), since + 1
            assert since <= 16
        else:
            settled = ladder.settle(state, step)
            if settled.score < state.score:
                assert step - state.restored_at >= 5 * state.hold
                since = 0
            state = settled


def test_a_relapse_at_once_tries_again_and_a_later_one_climbs() -> None:
    ladder = Ladder(budget=16, recovery_steps=25)
    first = ladder.climb(LadderState(), 100, 1.0, 0)
    at_once = ladder.climb(first, 102, 1.0, 0)
    later = ladder.climb(first, 140, 1.0, 0)
    assert ladder.rung(LadderState(), 100) == ladder.rung(first, 102) == 0
    rung = ladder.rung(first, 140)
    assert rung is not None
    assert rung > 0
    assert at_once.hold == first.hold < later.hold
    assert not ladder.recovered(first, 100 + first.hold - 1)
    assert ladder.recovered(first, 100 + first.hold)


def test_a_fault_that_comes_back_climbs_every_rung_before_the_halt() -> None:
    ladder, state, step, rungs = Ladder(budget=16, recovery_steps=25), LadderState(), 100, []
    while (rung := ladder.rung(state, step)) is not None:
        rungs.append(rung)
        state = ladder.climb(state, step, 1.0, 0)
        step += 10
    assert set(rungs) == set(range(RUNGS))


# -- retention --------------------------------------------------------------------------------------------------------

captures = st.lists(st.tuples(st.integers(1, 200), st.booleans(), st.floats(-5, 5)), min_size=1, max_size=60)


@given(captures, st.integers(2, 8))
def test_the_ring_never_exceeds_its_capacity(found: list[tuple[int, bool, float]], capacity: int) -> None:
    slots: tuple[Slot, ...] = ()
    now = 0
    for gap, certified, level in found:
        now += gap
        gone = to_evict(slots, now, capacity, certified=certified)
        assert set(gone) <= {s.step for s in slots}
        assert len(set(gone)) == len(gone)
        slots = (*(s for s in slots if s.step not in gone), Slot(now, certified, level if certified else math.inf))
        assert len(slots) <= capacity
        assert sum(not s.certified for s in slots) <= CANDIDATES


@given(captures, st.integers(3, 8))
@settings(max_examples=60)
def test_the_newest_and_the_best_certified_states_are_kept(found: list[tuple[int, bool, float]], capacity: int) -> None:
    slots: tuple[Slot, ...] = ()
    now = 0
    for gap, certified, level in found:
        now += gap
        settled = [s for s in slots if s.certified]
        gone = to_evict(slots, now, capacity, certified=certified)
        if settled:
            assert settled[-1].step not in gone
            assert min(settled, key=lambda s: s.level).step not in gone
        slots = (*(s for s in slots if s.step not in gone), Slot(now, certified, level if certified else math.inf))


def test_ages_spread_over_the_whole_run() -> None:
    """A long healthy run: the ring ends with states of all ages, not with the last few."""
    slots: tuple[Slot, ...] = ()
    for now in range(10, 5001, 10):
        gone = to_evict(slots, now, 8, certified=True)
        slots = (*(s for s in slots if s.step not in gone), Slot(now, True, 1.0 / now))
    ages = sorted(5000 - s.step for s in slots)
    assert len(slots) == 8
    assert ages[0] == 0
    assert ages[-1] > 2000
    decades = {int(math.log10(age + 1)) for age in ages}
    assert len(decades) >= 3


def test_candidates_leave_before_certified_states() -> None:
    ring = [Slot(10, True, 1.0), Slot(20, True, 0.9), Slot(30, False, math.inf), Slot(35, False, math.inf)]
    gone = to_evict(ring, 40, 8, certified=False)
    assert gone == (30,)
    assert set(to_evict(ring, 40, 4, certified=True)) >= {30}


# -- cadence ----------------------------------------------------------------------------------------------------------

seconds = st.floats(1e-6, 100.0)


@given(seconds, seconds, seconds, st.floats(0.001, 0.5), st.floats(1e-6, 0.1))
def test_measured_cadences_are_odd_bounded_and_within_budget(
    step_s: float, probe_s: float, snapshot_s: float, budget: float, fault_rate: float
) -> None:
    found = cadence(Settings(budget=budget, fault_rate=fault_rate), Costs(step_s, probe_s, snapshot_s, 4))
    assert found.probe_every % 2 == 1
    longest = cadence_module._LONGEST_PROBE | 1
    assert 5 <= found.probe_every <= longest
    assert found.snapshot_every >= 5
    share = budget / 2
    if found.probe_every < longest:
        assert probe_s / step_s / found.probe_every <= share * (1 + 1e-9)
    assert snapshot_s / step_s / found.snapshot_every <= share * (1 + 1e-9)
    assert found.snapshot_every <= max(50, math.ceil(snapshot_s / step_s / share))


@given(seconds, seconds, st.integers(1, 1000), st.integers(1, 1000))
def test_a_cadence_set_by_hand_wins(step_s: float, cost_s: float, probe: int, snapshot: int) -> None:
    settings_ = Settings(probe_every=probe, snapshot_every=snapshot)
    assert cadence(settings_, Costs(step_s, cost_s, cost_s, 4)) == cadence(settings_, None) == Cadence(probe, snapshot)


@given(st.floats(0.01, 0.2), st.floats(1e-4, 1e-2))
def test_snapshots_follow_young_where_the_budget_allows_it(cost: float, fault_rate: float) -> None:
    young = math.sqrt(2 * cost / fault_rate)
    assume(6 < young < 49)
    assume(cost / young < 0.2)
    found = cadence(Settings(budget=0.4, fault_rate=fault_rate), Costs(1.0, 0.01, cost, 4))
    assert found.snapshot_every == math.ceil(young)
    # It is the optimum of cost per interval plus expected loss of half an interval per fault.
    expense = [cost / n + fault_rate * n / 2 for n in range(1, 200)]
    assert abs(int(np.argmin(expense)) + 1 - young) <= 1.0


def test_a_clock_without_resolution_is_no_error() -> None:
    found = cadence(Settings(), Costs(0.0, 0.0, 0.0, 2))
    assert found.probe_every == 5
    assert found.snapshot_every == 5
