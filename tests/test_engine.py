"""The engine as a pure fold: what holds for every sequence of measurements, healthy, harmful or absurd.

Oracles: the engine itself under relations that must hold exactly (input untouched, the same twice, through a saved
state at every step, in another unit that is a power of two, with the probe's examples in another order: all bitwise),
and the theorems of envelope, ladder and ring on measurements that hypothesis makes up. `Flight` below plays the
supervisor: it takes the probes that are wanted, carries orders out or not, and reports what came of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalmanguard import statefile
from kalmanguard.control import policy
from kalmanguard.control.envelope import Envelope
from kalmanguard.control.judgement import Judge, Verdict
from kalmanguard.control.ladder import Ladder, LadderState
from kalmanguard.control.ledger import Episode
from kalmanguard.control.policy import _last_refuge
from kalmanguard.control.retention import Slot
from kalmanguard.engine import STATISTICS, Engine, EngineState
from kalmanguard.errors import ConfigurationError
from kalmanguard.journal.codec import pack
from kalmanguard.records import (
    Action,
    Costs,
    Decision,
    FloatArray,
    Level,
    Measurement,
    Mode,
    Outcome,
    ProbeReading,
)
from kalmanguard.settings import Settings

EXAMPLES, SKETCH = 32, 16
ProbeSource = Callable[[int], FloatArray]


def statistic(decision: Decision, name: str) -> float:
    return decision.statistics[STATISTICS.index(name)] if decision.statistics else math.nan


class Flight:
    """A supervisor without torch: folds measurements, takes wanted probes, and in protect mode carries orders out."""

    def __init__(self, probe: ProbeSource, *, settings: Settings | None = None, protect: bool = True) -> None:
        self.engine = Engine(settings if settings is not None else Settings(probe_every=5, snapshot_every=10))
        self.state, self.probe, self.protect = self.engine.init(), probe, protect
        self.log: list[tuple[Measurement, Decision]] = []
        self.ring: set[int] = set()
        self.fold(Measurement(step=0, probe=ProbeReading(probe(0))))

    def fold(self, m: Measurement) -> Decision:
        self.state, decision = self.engine.step(self.state, m)
        self.log.append((m, decision))
        if self.protect:
            orders = decision.orders
            if orders.adopt:
                assert decision.step - 1 not in self.ring
                self.ring.add(decision.step - 1)
            assert set(orders.evict) <= self.ring
            self.ring -= set(orders.evict)
            assert set(orders.certify) <= self.ring
            if orders.snapshot:
                assert decision.step not in self.ring
                self.ring.add(decision.step)
            if decision.mode is not Mode.HALTED:
                assert self.ring == {s.step for s in self.state.ledger.slots}
            assert len(self.ring) <= max(2, self.state.ledger.capacity) + 1
        return decision

    def step(self, m: Measurement) -> Decision:
        wanted = self.engine.observe(self.state, m).wants_probe
        reading = ProbeReading(self.probe(m.step)) if wanted else None
        first = decision = self.fold(dataclasses.replace(m, probe=reading))
        while self.protect and decision.proposed in (Action.ROLLBACK, Action.HALT):
            target = decision.orders.restore
            if target is None or decision.mode is Mode.HALTED:
                break
            assert target in self.ring
            certified = any(s.step == target and s.certified for s in self.state.ledger.slots)
            halt = decision.proposed is Action.HALT
            decision = self.fold(
                Measurement(
                    step=m.step,
                    outcome=Outcome(decision.proposed, target, decision.orders.rung, "same", "same"),
                    probe=None if certified or halt else ProbeReading(self.probe(target)),
                )
            )
            if halt:
                assert decision.mode is Mode.HALTED
        return first

    @property
    def decisions(self) -> list[Decision]:
        return [d for m, d in self.log if m.outcome is None]


def healthy(n: int, seed: int = 0, *, first: int = 1) -> Iterator[Measurement]:
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=SKETCH)
    for t in range(first, first + n):
        yield Measurement(
            step=t,
            loss=0.3 + 2.0 * math.exp(-t / 80) + float(rng.normal(0, 0.05)),
            learning_rates=(0.1,),
            gradient_norm=math.exp(float(rng.normal(0, 0.2))),
            velocity=0.1 * (direction + rng.normal(size=SKETCH)),
            rounding_floor=1e-6,
            buffer_norm=3.0 + float(rng.normal(0, 0.01)),
        )


def descent(seed: int = 1) -> ProbeSource:
    offsets = np.random.default_rng(seed).gamma(2.0, 0.1, EXAMPLES)

    def probe(step: int) -> FloatArray:
        noise = np.random.default_rng((seed, step)).normal(0, 0.02, EXAMPLES)
        return 0.3 + 2.0 * math.exp(-step / 80) + offsets + noise

    return probe


def from_step(step: int, harmed: ProbeSource, before: ProbeSource) -> ProbeSource:
    return lambda at: harmed(at) if at >= step else before(at)


def packed(log: list[tuple[Measurement, Decision]]) -> list[tuple[bytes, bytes]]:
    return [pack(m, d) for m, d in log]


# -- the fold ---------------------------------------------------------------------------------------------------------


def eventful() -> Flight:
    """A run with a veto, a suspicion, harm, a rollback, an uncertified restore and a recovery."""
    good = descent()
    flight = Flight(lambda s: good(s) + (3.0 if 141 <= s < 150 else 0.0))
    for m in healthy(260):
        if m.step == 60:
            m = dataclasses.replace(m, veto="nonfinite", gradient_norm=math.nan)
        if m.step == 100:
            m = dataclasses.replace(m, loss=math.nan)
        if m.step == 141:
            m = dataclasses.replace(m, loss=30.0, gradient_norm=500.0)
        if m.step == 30:
            m = dataclasses.replace(m, costs=Costs(0.1, 0.01, 0.001, 5))
        flight.step(m)
    return flight


def test_the_run_of_these_tests_has_everything() -> None:
    flight = eventful()
    actions = {d.action for d in flight.decisions}
    levels = {d.level for d in flight.decisions}
    assert actions >= {Action.ACCEPT, Action.VETO, Action.ROLLBACK}
    assert levels == set(Level)
    assert any(d.orders.release for d in flight.decisions)


def test_the_state_that_goes_in_is_left_as_it_was_and_the_fold_is_deterministic() -> None:
    log = eventful().log
    engine = Engine(Settings(probe_every=5, snapshot_every=10))
    state = engine.init()
    for measurement, decision in log:
        before = statefile.dump(state)
        velocity = None if measurement.velocity is None else measurement.velocity.copy()
        after, again = engine.step(state, measurement)
        _, twice = engine.step(state, measurement)
        assert statefile.dump(state) == before
        if velocity is not None:
            np.testing.assert_array_equal(measurement.velocity, velocity)
        assert pack(measurement, again) == pack(measurement, twice) == pack(measurement, decision)
        state = after


def test_folding_through_a_saved_state_is_bitwise_the_same() -> None:
    """Dump, load and fold on at every single step: no bit is lost in the text, and nothing lives outside the state."""
    log = eventful().log
    state = Engine(Settings(probe_every=5, snapshot_every=10)).init()
    for measurement, decision in log:
        engine = Engine(Settings(probe_every=5, snapshot_every=10))
        state, again = engine.step(statefile.load(statefile.dump(state)), measurement)
        assert pack(measurement, again) == pack(measurement, decision)


def test_a_step_is_an_observation_and_a_decision() -> None:
    log = eventful().log
    engine = Engine(Settings(probe_every=5, snapshot_every=10))
    state = engine.init()
    for measurement, decision in log:
        state, again = engine.decide(engine.observe(state, measurement), measurement.probe)
        assert pack(measurement, again) == pack(measurement, decision)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"type": "EngineState"}', '{"type": "os.system", "fields": []}', "1"]
)
def test_a_foreign_state_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="saved state"):
        statefile.load(text)


# -- metamorphic relations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [2.0**-20, 0.25, 2.0**20])
def test_the_unit_of_the_loss_does_not_matter(unit: float) -> None:
    """In units of a power of two nothing rounds differently, so every decision and score is the same to the bit."""
    log = eventful().log
    engine = Engine(Settings(probe_every=5, snapshot_every=10))
    state = engine.init()
    dimensionless = [STATISTICS.index(n) for n in ("drift_x", "z_loss", "z_gradient", "z_trajectory", "nis", "rank")]
    for m, decision in log:
        scaled = dataclasses.replace(
            m,
            loss=None if m.loss is None else unit * m.loss,
            probe=None if m.probe is None else ProbeReading(unit * m.probe.losses),
        )
        state, other = engine.step(state, scaled)
        assert (other.action, other.proposed, other.level, other.orders) == (
            decision.action,
            decision.proposed,
            decision.level,
            decision.orders,
        )
        if decision.statistics:
            for index in dimensionless:
                assert repr(other.statistics[index]) == repr(decision.statistics[index])
            y, expected = statistic(other, "y"), unit * statistic(decision, "y")
            assert y == expected or (math.isnan(y) and math.isnan(expected))


def test_the_order_of_probe_examples_does_not_matter() -> None:
    order = np.random.default_rng(3).permutation(EXAMPLES)
    log = eventful().log
    engine = Engine(Settings(probe_every=5, snapshot_every=10))
    state = engine.init()
    for m, decision in log:
        shuffled = m if m.probe is None else dataclasses.replace(m, probe=ProbeReading(m.probe.losses[order]))
        state, other = engine.step(state, shuffled)
        assert pack(m, other) == pack(m, decision)


def test_rotating_the_sketch_and_scaling_gradients_change_no_decision() -> None:
    from scipy.stats import ortho_group

    rotation = ortho_group.rvs(SKETCH, random_state=0)
    log = eventful().log
    engine = Engine(Settings(probe_every=5, snapshot_every=10))
    state = engine.init()
    for m, decision in log:
        turned = dataclasses.replace(
            m,
            velocity=None if m.velocity is None else 7.0 * m.velocity @ rotation,
            gradient_norm=None if m.gradient_norm is None else 0.1 * m.gradient_norm,
            rounding_floor=7.0 * m.rounding_floor,
        )
        state, other = engine.step(state, turned)
        assert (other.action, other.level, other.orders.restore) == (
            decision.action,
            decision.level,
            decision.orders.restore,
        )
        for name in ("z_gradient", "z_gain", "z_trajectory", "nis"):
            a, b = statistic(decision, name), statistic(other, name)
            assert b == pytest.approx(a, rel=1e-6, abs=1e-6, nan_ok=True)


# -- theorems, with hypothesis as the adversary -----------------------------------------------------------------------

adverse = st.floats(-5.0, 20.0) | st.floats(0.3, 1.2) | st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0])
strange_steps = st.lists(
    st.fixed_dictionaries(
        {
            "loss": st.none() | adverse,
            "gradient_norm": st.none() | st.floats(0, 1e12) | st.sampled_from([math.inf, math.nan]),
            "velocity": st.none() | st.floats(0, 1e9),
            "learning_rates": st.sampled_from([(), (0.1,), (0.0,), (5.0,), (0.1, 0.2)]),
            "veto": st.sampled_from([None, None, None, "nonfinite", "explosion", "clipped"]),
            "parameters_finite": st.sampled_from([True] * 9 + [False]),
            "tampered": st.sampled_from([(), (), (), ("parameters",), ("silent moments",), ("overwrite",)]),
            "buffer_norm": st.none() | st.floats(0, 1e6),
            "y": adverse,
        }
    ),
    min_size=1,
    max_size=60,
)


def adversarial(steps: list[dict[str, object]], *, protect: bool, budget: int = 6) -> Flight:
    """Forty healthy steps, then whatever hypothesis thinks of."""
    good = descent()

    def probe(step: int) -> FloatArray:
        index = step - 41
        return good(step) if index < 0 else np.full(EXAMPLES, float(steps[index]["y"]))  # type: ignore[arg-type]

    options = Settings(probe_every=3, snapshot_every=5, rollback_budget=budget, recovery_steps=4)
    flight = Flight(probe, settings=options, protect=protect)
    for m in healthy(40):
        flight.step(m)
    for index, values in enumerate(steps):
        changes = {k: v for k, v in values.items() if k != "y"}
        size = changes.pop("velocity")
        velocity = None if size is None else np.full(SKETCH, float(size) / 4)  # type: ignore[arg-type]
        finite = bool(changes["parameters_finite"])
        if changes["gradient_norm"] is None and changes["veto"] != "nonfinite":
            changes["veto"] = None  # nothing is dropped or clipped for a size that was not seen
        flight.step(Measurement(step=41 + index, velocity=velocity if finite else None, **changes))  # type: ignore[arg-type]
    return flight


@given(strange_steps, st.booleans())
@settings(max_examples=60)
def test_every_accepted_probe_lies_inside_the_envelope(steps: list[dict[str, object]], protect: bool) -> None:
    flight = adversarial(steps, protect=protect)
    best, warm = math.inf, False
    for _, decision in flight.log:
        if warm and statistic(decision, "accepted") == 1.0:
            y, bound = statistic(decision, "y"), statistic(decision, "bound")
            assert y <= bound
            assert bound == statistic(decision, "y_best") + statistic(decision, "allowance")
        warm = warm or decision.level is Level.NOMINAL
        y_best = statistic(decision, "y_best")
        if math.isfinite(y_best):
            assert y_best <= best  # the ratchet only tightens
            best = y_best


@given(strange_steps, st.integers(1, 8))
@settings(max_examples=60)
def test_no_sequence_gets_more_rollbacks_than_the_budget_without_a_recovery(
    steps: list[dict[str, object]], budget: int
) -> None:
    flight = adversarial(steps, protect=True, budget=budget)
    state = Engine(flight.engine.settings).init()
    rollbacks, score = 0, 0
    for m, _ in flight.log:
        state, _ = flight.engine.step(state, m)
        now = state.ledger.ladder.score
        if now < score:
            rollbacks = 0
        rollbacks += m.outcome is not None and m.outcome.action is Action.ROLLBACK
        assert rollbacks <= budget
        score = now


@given(strange_steps)
@settings(max_examples=40)
def test_what_is_restored_was_kept_and_a_halt_is_final(steps: list[dict[str, object]]) -> None:
    flight = adversarial(steps, protect=True, budget=2)  # `Flight` itself asserts that orders and ring agree
    modes = [d.mode for _, d in flight.log]
    if Mode.HALTED in modes:
        first = modes.index(Mode.HALTED)
        assert set(modes[first:]) == {Mode.HALTED}
        assert all(d.action is Action.HALT for _, d in flight.log[first:])


@given(strange_steps)
@settings(max_examples=40)
def test_nothing_makes_the_state_unwritable_or_the_reason_empty(steps: list[dict[str, object]]) -> None:
    flight = adversarial(steps, protect=False)
    text = statefile.dump(flight.state)
    assert statefile.dump(statefile.load(text)) == text
    for measurement, decision in flight.log:
        assert decision.reason.endswith(".")
        assert f"{measurement.step}" in decision.reason or decision.mode is Mode.HALTED
        assert len(pack(measurement, decision)) == 2


# -- single rules -----------------------------------------------------------------------------------------------------


def test_a_healthy_run_is_left_alone() -> None:
    flight = Flight(descent())
    for m in healthy(600):
        flight.step(m)
    assert {d.action for d in flight.decisions} == {Action.ACCEPT}
    assert sum(d.level is Level.SUSPECT for d in flight.decisions) <= 2
    assert flight.decisions[-1].level is Level.NOMINAL
    assert flight.decisions[-1].certificate == "HOLDS"


def test_without_a_loss_a_gradient_or_a_velocity_the_probe_still_guards() -> None:
    good = descent()
    flight = Flight(from_step(200, lambda s: good(s) + 50.0, good))
    for m in healthy(260):
        flight.step(Measurement(step=m.step))
    rolled = [d for d in flight.decisions if d.proposed is Action.ROLLBACK]
    assert rolled
    assert rolled[0].step < 220
    assert rolled[0].orders.restore is not None
    assert rolled[0].orders.restore < 200


@pytest.mark.parametrize("protect", [True, False])
def test_a_parameter_that_is_not_finite_is_confirmed_at_once(protect: bool) -> None:
    flight = Flight(descent(), protect=protect)
    for m in healthy(150):
        decision = flight.step(dataclasses.replace(m, parameters_finite=m.step != 150, velocity=None))
    assert decision.proposed is Action.ROLLBACK
    assert decision.level is Level.CONFIRMED
    assert "not finite" in decision.reason
    assert decision.orders.restore is not None
    assert decision.orders.restore < 150


def test_a_held_out_loss_that_is_not_finite_is_confirmed() -> None:
    good = descent()
    flight = Flight(from_step(150, lambda s: np.full(EXAMPLES, math.nan), good))
    for m in healthy(160):
        decision = flight.step(m)
        if decision.proposed is Action.ROLLBACK:
            break
    assert decision.proposed is Action.ROLLBACK
    assert "held-out loss is not finite" in decision.reason


def test_a_loss_that_is_not_finite_is_watched_and_probed_but_rolls_nothing_back() -> None:
    for value in (math.nan, math.inf):
        flight = Flight(descent())
        for m in healthy(150):
            decision = flight.step(dataclasses.replace(m, loss=value) if m.step == 150 else m)
        assert decision.action is Action.ACCEPT
        assert decision.level is Level.SUSPECT
        assert not math.isnan(statistic(decision, "y"))  # suspicion has bought a probe
        assert "training loss is not finite" in decision.reason
        # And no filter has seen it.
        after = flight.step(next(healthy(1, seed=5, first=151)))
        assert math.isfinite(statistic(after, "loss_level"))


def test_vetoes_are_recorded_and_rolled_back_only_when_they_do_not_end() -> None:
    flight = Flight(descent())
    steps = list(healthy(200))
    for m in steps[:120]:
        flight.step(m)
    vetoed = [
        flight.step(dataclasses.replace(m, veto="nonfinite", gradient_norm=math.inf, velocity=np.zeros(SKETCH)))
        for m in steps[120:123]
    ]
    assert {(d.action, d.level) for d in vetoed} == {(Action.VETO, Level.CONFIRMED)}
    assert flight.step(steps[123]).action is Action.ACCEPT
    for m in steps[124:150]:
        decision = flight.step(dataclasses.replace(m, veto="nonfinite", gradient_norm=math.nan, velocity=None))
        if decision.proposed is Action.ROLLBACK:
            break
    assert decision.proposed is Action.ROLLBACK
    assert "in a row were not finite" in decision.reason


def test_in_observe_mode_a_proposal_is_made_once_per_harm() -> None:
    good = descent()
    flight = Flight(from_step(150, lambda s: good(s) + 40.0, good), protect=False)
    for m in healthy(400):
        m = dataclasses.replace(m, loss=40.0) if m.step >= 150 else m
        flight.step(m)
    proposals = [d.step for d in flight.decisions if d.proposed is Action.ROLLBACK]
    assert len(proposals) == 1
    assert 150 <= proposals[0] <= 165
    # When the run has come back by itself, a new harm is a new proposal.
    back = Flight(lambda s: good(s) + (40.0 if 150 <= s < 170 or s >= 300 else 0.0), protect=False)
    for m in healthy(400):
        back.step(dataclasses.replace(m, loss=40.0) if 150 <= m.step < 170 or m.step >= 300 else m)
    proposals = [d.step for d in back.decisions if d.proposed is Action.ROLLBACK]
    assert len(proposals) == 2
    assert proposals[1] >= 300


def test_harm_that_heals_at_once_is_left_alone() -> None:
    good = descent()
    flight = Flight(lambda s: good(s) + (0.25 if 150 <= s < 153 else 0.0))
    for m in healthy(300):
        flight.step(m)
    assert {d.action for d in flight.decisions} == {Action.ACCEPT}


def test_overfitting_is_told_from_instability() -> None:
    """The training loss falls to its lowest while the held-out loss creeps up: advised, openly lapsed, not undone."""
    good = descent()
    turn = good(200)
    flight = Flight(from_step(200, lambda s: turn + 0.004 * (s - 200), good))
    for m in healthy(800):
        if m.step >= 200:
            assert m.loss is not None
            m = dataclasses.replace(m, loss=m.loss - 0.0002 * (m.step - 200))
        flight.step(m)
    assert {d.action for d in flight.decisions} == {Action.ACCEPT}
    advice = [d for d in flight.decisions if any(e.detector == "overfitting" for e in d.evidence)]
    assert advice
    assert "stopping early" in next(e.message for e in advice[0].evidence if e.detector == "overfitting")
    assert flight.decisions[-1].certificate == "LAPSED"


def test_overfitting_does_not_excuse_a_training_loss_that_rises() -> None:
    good = descent()
    turn = good(200)
    flight = Flight(from_step(200, lambda s: turn + 0.004 * (s - 200), good), protect=False)
    for m in healthy(800):
        if m.step >= 200:
            assert m.loss is not None
            m = dataclasses.replace(m, loss=m.loss + 0.004 * (m.step - 200))
        flight.step(m)
    assert any(d.proposed is Action.ROLLBACK for d in flight.decisions)


@pytest.mark.parametrize("per_step", [0.001, 0.004, 0.02])
def test_a_creep_that_no_single_probe_shows_ends_at_the_bound(per_step: float) -> None:
    """Every probe is close to its prediction, so the innovation gate alone would let the loss climb without end."""
    good = descent()
    turn = good(200)
    flight = Flight(from_step(200, lambda s: turn + per_step * (s - 200), good), protect=False)
    for m in healthy(1500):
        flight.step(dataclasses.replace(m, loss=None))
    accepted = [d for d in flight.decisions if d.step > 100 and statistic(d, "accepted") == 1.0]
    assert all(statistic(d, "y") <= statistic(d, "bound") for d in accepted)
    highest = max(statistic(d, "y") for d in accepted if d.step > 200)
    allowances = [statistic(d, "allowance") for d in accepted]
    assert highest <= statistic(accepted[-1], "y_best") + max(allowances)
    assert any(d.proposed is Action.ROLLBACK for d in flight.decisions)


def test_without_a_training_loss_overfitting_is_never_inferred() -> None:
    good = descent()
    turn = good(200)
    flight = Flight(from_step(200, lambda s: turn + 0.004 * (s - 200), good), protect=False)
    for m in healthy(800):
        flight.step(dataclasses.replace(m, loss=None))
    assert not any(e.detector == "overfitting" for d in flight.decisions for e in d.evidence)


# -- how soon harm is confirmed ----------------------------------------------------------------------------------------


def first_harm(flight: Flight) -> tuple[int, float]:
    """Step of the first proposed rollback, and the share of the progress that was lost there."""
    decision = next(d for d in flight.decisions if d.proposed is Action.ROLLBACK)
    y, start, best = (statistic(decision, name) for name in ("y", "y0", "y_best"))
    return decision.step, (y - best) / (start - best)


def climb(per_step: float, *, rate: float = 0.1, loss: float = 0.0) -> Flight:
    """From step 200 on the held-out loss climbs, at another learning rate, or with a training loss that is off."""
    good = descent()
    turn = good(200)
    flight = Flight(from_step(200, lambda s: turn + per_step * (s - 200), good), protect=False)
    for m in healthy(330):
        if m.step >= 200:
            assert m.loss is not None
            m = dataclasses.replace(m, loss=m.loss + loss, learning_rates=(rate,))
        flight.step(m)
    return flight


def test_harm_under_a_learning_rate_that_was_never_certified_is_confirmed_sooner() -> None:
    late, raised = first_harm(climb(0.008, loss=0.3)), first_harm(climb(0.008, loss=0.3, rate=0.4))
    assert raised[0] < late[0]
    assert raised[1] < 0.1 < late[1]


def test_harm_that_is_about_to_leave_the_envelope_is_not_waited_for() -> None:
    """An eighth of the progress a step: the next step would be outside, and the training loss says why."""
    alone, explained = first_harm(climb(0.12)), first_harm(climb(0.12, loss=5.0))
    assert explained[0] < alone[0]
    assert explained[1] < 0.2, "confirmed inside the envelope"


@pytest.mark.parametrize("spike", [0.2, 3.0])
def test_spikes_that_are_small_beside_the_progress_are_left_to_heal(spike: float) -> None:
    """Late in training Adam has some: hundreds of deviations, a tenth of the progress, and over in a dozen steps."""
    good, hill = descent(), (0.1, 0.12, 0.14, 0.16, 0.18, 0.18, 0.17, 0.12, 0.06, 0.02)
    flight = Flight(lambda s: good(s) + (hill[s - 500] if 500 <= s < 500 + len(hill) else 0.0), protect=False)
    for m in healthy(700):
        loss = 0.3 + 2.0 * math.exp(-m.step / 80) + 0.005 * math.sin(m.step)
        flight.step(dataclasses.replace(m, loss=loss + (spike if 500 <= m.step < 500 + len(hill) else 0.0)))
    assert any(e.fired and e.detector == "loss" for d in flight.decisions for e in d.evidence)
    proposed = {d.proposed for d in flight.decisions}
    assert proposed == ({Action.ACCEPT} if spike < 1 else {Action.ACCEPT, Action.ROLLBACK})


def test_what_falls_back_is_not_about_to_leave() -> None:
    episode = Episode(onset=1, last=5, explained=True, y=0.40)
    verdict = Verdict(y=0.35, envelope=Envelope(1.0, 0.1, 0.2, 0.0))
    assert not Judge._leaves(verdict, episode, 4)
    assert Judge._leaves(verdict._replace(y=0.45), episode, 4)
    assert Judge._leaves(verdict._replace(y=0.28), episode._replace(y=0.24), 2)
    assert not Judge._leaves(verdict._replace(y=0.28), episode._replace(y=0.275), 2)


def test_a_restored_run_is_held_closer_until_its_ladder_is_settled() -> None:
    good = descent()
    flight = Flight(lambda s: good(s) + (3.0 if 141 <= s < 145 else 0.0))
    trials: list[tuple[Mode, bool, bool]] = []
    for m in healthy(500):
        if m.step == 141:
            m = dataclasses.replace(m, loss=30.0)
        decision = flight.step(m)
        ledger = flight.state.ledger
        if not math.isnan(statistic(decision, "y")) and decision.proposed is Action.ACCEPT:
            at_best = ProbeReading(np.full(EXAMPLES, ledger.best))
            reached = Judge(Settings()).judge(flight.state.estimators, ledger, m, at_best)[2]
            assert reached.envelope is not None
            closer = max(ledger.ladder.level, ledger.best) + 0.125 * reached.envelope.allowance
            expected = min(closer, reached.envelope.bound) if ledger.ladder.score else reached.envelope.bound
            assert reached.bound == pytest.approx(expected, rel=1e-12)
            trials.append((decision.mode, ledger.ladder.score > 0, closer < reached.envelope.bound))
    assert (Mode.RECOVERING, True, True) in trials
    assert (Mode.WATCHING, True, True) in trials, "released, and still on trial"
    assert trials[-1][:2] == (Mode.WATCHING, False)


def test_the_first_step_of_a_suspicion_is_kept_for_a_halt_and_not_for_a_rollback() -> None:
    """The best state there is may have poisoned moments: a rollback goes behind it, a false alarm clears it."""
    for harmed in (True, False):
        good = descent()
        # At step 143 the probe falls far below what it was at the last look; noise alone would not be enough.
        flight = Flight(
            lambda s, good=good, harmed=harmed: good(s) - 0.2 * (s >= 143) + (3.0 if harmed and s > 143 else 0.0)
        )
        for m in healthy(200):
            m = dataclasses.replace(m, costs=Costs(0.1, 0.05, 0.001, 6) if m.step == 30 else None)
            if m.step in (143, 144):
                m = dataclasses.replace(m, loss=30.0)
            decision = flight.step(m)
            if m.step == 143:
                (slot,) = (s for s in flight.state.ledger.slots if s.suspect)
                assert slot.step == 143
                assert slot.certified
                assert slot.level == min(s.level for s in flight.state.ledger.slots)
            if decision.proposed is Action.ROLLBACK:
                assert harmed
                assert decision.orders.restore is not None
                assert decision.orders.restore < 143
                assert 143 in {s.step for s in flight.state.ledger.slots}
                break
        if not harmed:
            assert not any(s.suspect for s in flight.state.ledger.slots)


def test_a_new_objective_begins_anew() -> None:
    good = descent()
    flight = Flight(lambda s: good(s) if s < 200 else 30.0 + good(s - 200))
    for m in healthy(200):
        flight.step(m)
    flight.ring.clear()
    for m in healthy(200, seed=4, first=201):
        assert m.loss is not None
        flight.step(dataclasses.replace(m, loss=30.0 + m.loss, objective=1))
    late = flight.decisions[-200:]
    assert {d.action for d in late} == {Action.ACCEPT}
    assert late[0].level is Level.WARMUP
    assert statistic(late[0], "y0") > 30.0
    assert max(s.step for s in flight.state.ledger.slots) > 201
    assert min(s.step for s in flight.state.ledger.slots) > 200


def test_costs_freeze_the_cadence() -> None:
    flight = Flight(descent(), settings=Settings(budget=0.1))
    for m in healthy(400):
        costs = Costs(step_s=1.0, probe_s=0.75, snapshot_s=0.1, slots=4) if m.step == 30 else None
        flight.step(dataclasses.replace(m, costs=costs))
    probed = [d.step for d in flight.decisions if not math.isnan(statistic(d, "y")) and d.step > 150]
    gaps = {b - a for a, b in pairwise(probed)}
    assert gaps == {15}
    assert flight.state.ledger.capacity == 4
    assert 2 <= len(flight.ring) <= 4


def test_velocities_below_the_rounding_floor_are_not_judged() -> None:
    flight = Flight(descent())
    for m in healthy(100):
        assert m.velocity is not None
        decision = flight.step(dataclasses.replace(m, rounding_floor=10.0 * float(np.linalg.norm(m.velocity))))
        assert math.isnan(statistic(decision, "z_trajectory"))
        assert math.isnan(statistic(decision, "z_gain"))


def test_the_gradient_gate_follows_the_largest_healthy_gradient() -> None:
    flight = Flight(descent())
    gates = [flight.step(m).orders.gate for m in healthy(200)]
    assert gates[0] == math.inf  # nothing is known yet
    norms = [m.gradient_norm for m in healthy(200)]
    ratio = flight.engine.settings.gate_ratio
    assert gates[-1] == pytest.approx(ratio * max(n for n in norms if n is not None), rel=0.3)


def test_an_uncertified_state_is_probed_after_its_restore_and_an_older_one_is_tried() -> None:
    """Harm that began before it was seen: the candidate is as bad, so it is evicted and the next older one restored."""
    good = descent()
    flight = Flight(from_step(104, lambda s: good(s) + 40.0, good), settings=Settings(probe_every=50, snapshot_every=3))
    for m in healthy(160):
        flight.step(m)
    restores = [m.outcome.restored_step for m, _ in flight.log if m.outcome is not None]
    assert restores
    final = [d for m, d in flight.log if m.outcome is not None][-1]
    assert final.proposed is not Action.ROLLBACK
    assert restores[-1] is not None
    assert restores[-1] < 104


def test_statistics_have_their_names() -> None:
    state, decision = Engine(Settings()).step(EngineState(), Measurement(step=1, loss=1.0, learning_rates=(0.1,)))
    assert len(decision.statistics) == len(STATISTICS) == len(set(STATISTICS))
    assert state.ledger.probes == 0


def bad_data(m: Measurement, *, norm: float = 6.0) -> Measurement:
    """A batch on which the model is worse than untrained, with a gradient below ten times the largest so far."""
    return dataclasses.replace(m, loss=9.0, gradient_norm=norm)


def test_bad_data_is_dropped_while_the_state_is_good_and_then_the_ladder_begins() -> None:
    flight = Flight(descent())
    steps = list(healthy(400))
    before = [flight.step(m) for m in steps[:200]][-1]
    largest = flight.state.estimators.largest_gradient
    first = flight.step(bad_data(steps[200]))
    assert (first.action, first.level) == (Action.ACCEPT, Level.SUSPECT)
    assert before.orders.gate > 9.0 * largest
    assert first.orders.gate == pytest.approx(largest)  # not raised by the bad gradient itself
    assert not first.orders.clip
    for m in steps[201:208]:
        dropped = flight.step(dataclasses.replace(bad_data(m), veto="explosion", velocity=np.zeros(SKETCH)))
        assert (dropped.action, dropped.orders.gate, dropped.orders.clip) == (Action.VETO, first.orders.gate, False)
    last = flight.step(dataclasses.replace(bad_data(steps[208]), veto="explosion", velocity=np.zeros(SKETCH)))
    assert last.proposed is Action.ROLLBACK
    assert "8 proposed steps in a row were dropped" in last.reason
    assert last.orders.restore is not None
    assert last.orders.restore <= 200


def test_the_gate_opens_again_with_the_first_batch_that_is_not_hopeless() -> None:
    flight = Flight(descent())
    steps = list(healthy(260))
    for m in steps[:200]:
        flight.step(m)
    tight = flight.step(bad_data(steps[200])).orders.gate
    dropped = dataclasses.replace(steps[201], gradient_norm=2.0 * tight, veto="explosion", velocity=np.zeros(SKETCH))
    opened = flight.step(dropped)
    assert opened.action is Action.VETO
    assert opened.orders.gate > 9.0 * tight
    assert {flight.step(m).action for m in steps[202:]} == {Action.ACCEPT}


@pytest.mark.parametrize("why", ["no loss is passed", "the state is bad as well", "worse, but not hopeless"])
def test_the_gate_stays_wide_unless_the_data_alone_is_bad(why: str) -> None:
    good = descent()
    harmed = from_step(201, lambda s: good(s) + 0.6, good) if why == "the state is bad as well" else good
    flight = Flight(harmed)
    steps = list(healthy(260))
    for m in steps[:200]:
        flight.step(dataclasses.replace(m, loss=None) if why == "no loss is passed" else m)
    loss = {"no loss is passed": None, "worse, but not hopeless": 1.5}.get(why, 9.0)
    decision = flight.step(dataclasses.replace(steps[200], loss=loss, gradient_norm=6.0))
    if decision.proposed is Action.ACCEPT:
        assert decision.orders.gate > 50.0  # ten times the gradient that was just applied, not what was before


def test_the_first_state_of_a_suspicion_is_kept_when_the_ring_holds_none_better() -> None:
    flight = Flight(descent(), settings=Settings(probe_every=5, snapshot_every=40))
    steps = list(healthy(130))
    for m in steps[:30]:
        flight.step(m)
    flight.step(dataclasses.replace(steps[30], costs=Costs(0.1, 0.01, 0.001, 6)))
    for m in steps[31:113]:
        flight.step(m)
    held = {s.step for s in flight.state.ledger.slots}
    assert 114 not in held
    decision = flight.step(dataclasses.replace(steps[113], loss=9.0))
    assert decision.level is Level.SUSPECT
    assert decision.orders.snapshot
    slot = next(s for s in flight.state.ledger.slots if s.step == 114)
    assert (slot.certified, slot.suspect) == (True, True)


def test_a_halt_goes_to_the_best_state_from_before_the_trouble_unless_a_later_one_is_clearly_better() -> None:
    levels = {10: 0.9, 60: 0.51, 70: 0.502, 80: 0.500}
    slots = (*(Slot(step, True, level) for step, level in levels.items()), Slot(90, False, math.inf))
    assert _last_refuge(slots, 75, 0.005) == 70
    assert _last_refuge(slots, 75, 0.001) == 80
    assert _last_refuge(slots, 65, 0.020) == 60
    assert _last_refuge(slots, 5, 0.005) == 80
    spoilt = (*slots[:2], slots[2]._replace(suspect=True), *slots[3:])
    assert _last_refuge(spoilt, 75, 0.020) == 60
    assert _last_refuge(slots[-1:], 75, 0.001) == 90
    assert _last_refuge((), 75, 0.001) is None


def test_a_new_objective_has_a_warm_up_of_its_own() -> None:
    flight = Flight(descent(), protect=False)
    steps = list(healthy(400))
    for m in steps[:200]:
        flight.step(m)
    again = descent()
    flight.probe = lambda step: again(step - 200) + 3.0
    levels = []
    for m in steps[200:]:
        restarted = dataclasses.replace(m, objective=1, loss=4.0 + 3.0 * math.exp(-(m.step - 200) / 80))
        levels.append(flight.step(restarted).level)
    warmup = flight.engine.settings.warmup_steps
    assert set(levels[: warmup - 1]) == {Level.WARMUP}
    assert levels[-1] is Level.NOMINAL
    assert {d.proposed for d in flight.decisions} == {Action.ACCEPT}


def test_a_braced_state_enters_the_ring_with_the_first_step_of_a_suspicion_and_no_more_than_fit() -> None:
    settings = Settings(probe_every=5, snapshot_every=1_000)
    flight = Flight(descent(), settings=settings)
    steps = list(healthy(900))
    adopted = []
    for m in steps:
        if m.step == 30:
            m = dataclasses.replace(m, costs=Costs(0.1, 0.01, 0.001, 5))
        odd = m.step >= 100 and m.step % 50 == 0
        braced = dataclasses.replace(m, braced=m.step >= 100, loss=9.0 if odd else m.loss)
        decision = flight.step(braced)
        if decision.orders.adopt:
            assert decision.level is Level.SUSPECT
            adopted.append(m.step)
    assert adopted
    assert all(step % 50 == 0 for step in adopted)
    assert len(flight.ring) <= 6  # the harness checks the same at every step


def test_rolling_back_to_a_braced_state_loses_no_step() -> None:
    good = descent()
    flight = Flight(from_step(187, lambda s: good(s) + 40.0, good))
    steps = list(healthy(200))
    for m in steps[:186]:
        flight.step(m)
    decision = flight.step(dataclasses.replace(steps[186], braced=True, loss=60.0, learning_rates=(5.0,)))
    assert decision.proposed is Action.ROLLBACK
    assert decision.orders.adopt
    assert decision.orders.restore == 186


def test_large_gradients_are_clipped_after_gate_skips_however_many_those_are() -> None:
    flight = Flight(descent(), settings=Settings(probe_every=5, snapshot_every=10, gate_skips=20))
    steps = list(healthy(260))
    for m in steps[:200]:
        flight.step(m)
    for m in steps[200:219]:
        large = dataclasses.replace(m, gradient_norm=500.0, veto="explosion", velocity=np.zeros(SKETCH))
        decision = flight.step(large)
        assert (decision.proposed, decision.orders.clip) == (Action.VETO, False)
    decision = flight.step(dataclasses.replace(steps[219], gradient_norm=500.0, veto="explosion", velocity=None))
    assert (decision.proposed, decision.orders.clip) == (Action.VETO, True)


def test_a_training_loss_in_another_unit_is_judged_by_its_own_progress() -> None:
    """The same run with its training loss summed over 64 examples: nothing that is decided changes."""
    decisions = []
    for scale in (1.0, 64.0):
        flight = Flight(descent(), protect=False)
        for m in healthy(300):
            assert m.loss is not None
            odd = m.step in (200, 201, 240)
            flight.step(dataclasses.replace(m, loss=scale * (9.0 if odd else m.loss)))
        decisions.append([(d.proposed, d.level, d.orders.gate) for d in flight.decisions])
    assert decisions[0] == decisions[1]


@pytest.mark.parametrize("harm", [0.0, 0.6])
def test_an_edit_is_undone_at_once_when_the_probe_leaves_its_bound(harm: float) -> None:
    good = descent()
    flight = Flight(from_step(187, lambda s: good(s) + harm, good))
    steps = list(healthy(200))
    for m in steps[:186]:
        flight.step(m)
    decision = flight.step(dataclasses.replace(steps[186], tampered=("parameters",)))
    assert decision.level is (Level.CONFIRMED if harm else Level.SUSPECT)
    assert decision.proposed is (Action.ROLLBACK if harm else Action.ACCEPT)
    if harm:
        assert "parameters changed without an optimizer step, and the held-out loss" in decision.reason


def test_edits_that_are_a_habit_are_left_to_the_envelope() -> None:
    good = descent()
    flight = Flight(from_step(187, lambda s: good(s) + 0.6, good))
    for m in list(healthy(187)):
        decision = flight.step(dataclasses.replace(m, tampered=("parameters",) if m.step >= 100 else ()))
    assert decision.proposed is Action.ACCEPT


# --- warm-up, and cuts that last --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [1.0, 60.0])
def test_in_warmup_only_what_is_worse_on_its_own_batches_too_is_undone(training: float) -> None:
    """A probe that rises alone may be what was asked for: fine-tuning from an optimum, stale BatchNorm statistics."""
    flight = Flight(lambda step: np.full(64, 2.3 if step < 5 else 9.0))
    for m in list(healthy(120)):
        assert m.loss is not None
        flight.step(dataclasses.replace(m, loss=m.loss * (1.0 if m.step < 5 else training)))
    undone = [d for d in flight.decisions if d.proposed is not Action.ACCEPT]
    assert bool(undone) is (training > 1.0)
    if undone:
        assert undone[0].step > 30
        assert "worse than before training" in undone[0].reason


def test_a_spike_that_healed_or_was_dropped_moves_no_later_onset() -> None:
    flight = Flight(
        descent(), settings=Settings(probe_every=5, snapshot_every=10, detectors=(*Settings().detectors, "onset"))
    )
    steps = list(healthy(400))
    for m in steps[:300]:
        flight.step(m)
    flight.step(dataclasses.replace(steps[300], gradient_norm=1e6, veto="explosion", velocity=np.zeros(SKETCH)))
    flight.step(dataclasses.replace(steps[301], gradient_norm=60.0))
    for m in steps[302:320]:
        flight.step(m)
    flight.step(dataclasses.replace(steps[320], loss=60.0, learning_rates=(5.0,)))
    episode = flight.state.ledger.episode
    assert episode is not None
    assert episode.onset == 321


def test_a_relapse_counts_only_after_a_cut_was_given_back() -> None:
    ladder, state = Ladder(budget=16, recovery_steps=25), LadderState()
    for step in (10, 20):
        state = ladder.climb(state, step, 1.0, step)
    assert (state.cut, state.given_back, state.relapses) == (True, False, 0)
    state = ladder.climb(ladder.released(state), 100, 1.0, 100)
    assert (state.cut, state.relapses) == (True, 1)
    plain = ladder.climb(ladder.released(ladder.climb(LadderState(), 10, 1.0, 10)), 60, 1.0, 60)
    assert plain.relapses == 0  # nothing had been cut


@pytest.mark.parametrize("rung", [0, 1])
def test_an_unprobed_candidate_does_not_hide_a_certified_state(rung: int) -> None:
    slots = (Slot(10, True, 2.0), Slot(50, False, math.inf))
    assert policy._target(slots, 40, rung, 5.0, 1.0) == 10
