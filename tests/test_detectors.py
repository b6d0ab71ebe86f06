"""Detectors held against the theorems that their docstrings state.

Oracles: the long-run bound of quantile tracking (exact, for any sequence: hypothesis plays the adversary); optional
stopping for the Shiryaev-Roberts detector (mean run length at least the stated one, and Doob's inequality for early
alarms, both with bounds that a right detector leaves once in a million seeds); the standard normal for the paired test
(binomial bounds); closed forms elsewhere.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from kalmanguard import Engine, Settings, Supervisor
from kalmanguard.calibration import load
from kalmanguard.detectors.drift import MARGIN, RATES, DriftResult, DriftState, DriftTest
from kalmanguard.detectors.excursion import GROWTH, RATIO, ExcursionState, LearningRateExcursion
from kalmanguard.detectors.fusion import FusionState, FusionTest
from kalmanguard.detectors.paired import paired_standard_error, paired_test
from kalmanguard.detectors.tail import TailState, TailTest
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.bank import CHANNELS
from kalmanguard.estimators.noise import Scale
from kalmanguard.models.mlp import MLPPlant
from kalmanguard.records import Evidence, Guarantee, Innovation
from kalmanguard.replay import replay

#: One in a million seeds.
RARE = 1e-6
ETA = 0.5  # step of the quantile tracking, as the docstring's bound names it


# -- tail -------------------------------------------------------------------------------------------------------------


def firings(test: TailTest, scores: list[float]) -> tuple[TailState, int]:
    state, count = TailState(), 0
    for z in scores:
        state, evidence = test.step(state, Innovation("x", z, 1.0))
        count += evidence is not None
    return state, count


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=300),
    st.floats(1.5, 20),
    st.floats(1e-4, 0.5),
)
def test_firings_are_bounded_for_any_sequence(scores: list[float], threshold: float, rate: float) -> None:
    _, count = firings(TailTest("x", threshold=threshold, rate=rate), scores)
    largest = max(scores)
    bound = rate * len(scores) + (math.log(largest / threshold) + ETA) / ETA if largest > threshold else 0.0
    assert count <= bound + 1e-9


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_an_adversary_who_knows_the_threshold_cannot_exceed_the_bound(rate: float) -> None:
    """Every step just above the threshold in force, as long as that stays below H: the worst sequence there is."""
    test, state, highest, steps, count = TailTest("x", threshold=8.0, rate=rate), TailState(), 100.0, 5000, 0
    for _ in range(steps):
        z = min(highest, 1.0001 * test.threshold(state))
        state, evidence = test.step(state, Innovation("x", z, 1.0))
        count += evidence is not None
    bound = rate * steps + (math.log(highest / 8.0) + ETA) / ETA
    assert 0.8 * rate * steps < count <= bound


@pytest.mark.parametrize("freedom", [1.5, 3.0])
def test_heavy_tails_buy_a_few_looks_and_are_left_alone(freedom: float) -> None:
    rng = np.random.default_rng(0)
    scores = np.abs(rng.standard_t(freedom, 50_000)).tolist()
    _, count = firings(TailTest("x", threshold=4.0, rate=1e-3), scores)
    fixed = sum(z > 4.0 for z in scores)
    bound = 1e-3 * len(scores) + (math.log(max(scores) / 4.0) + ETA) / ETA
    assert 0 < count <= bound < fixed


def test_threshold_rises_with_a_firing_and_returns_to_where_it_was() -> None:
    test = TailTest("x", threshold=5.0, rate=0.01)
    state, evidence = test.step(TailState(), Innovation("x", 6.0, 1.0))
    assert evidence is not None
    raised = test.threshold(state)
    assert raised > 5.0
    thresholds = [raised]
    for _ in range(200):
        state, none = test.step(state, Innovation("x", 0.0, 1.0))
        assert none is None
        thresholds.append(test.threshold(state))
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[-1] == 5.0


@given(st.floats(-50, 50), st.floats(1e-6, 1e6))
def test_sides_and_units(z: float, unit: float) -> None:
    assume(abs(abs(z) - 8.0) > 1e-9)
    one, two = TailTest("x", threshold=8.0, rate=0.001), TailTest("x", threshold=8.0, rate=0.001, two_sided=True)
    innovation = Innovation("x", z * unit, unit)
    _, upward = one.step(TailState(), innovation)
    _, both = two.step(TailState(), innovation)
    assert (upward is not None) == (z > 8.0)
    assert (both is not None) == (abs(z) > 8.0)


def test_evidence_says_how_far_and_what_it_is_worth() -> None:
    _, evidence = TailTest("loss", threshold=2.0, rate=0.01).step(TailState(), Innovation("loss", 0.6, 0.2))
    assert evidence is not None
    assert evidence.fired
    assert evidence.guarantee is Guarantee.HEURISTIC
    assert evidence.p_value == pytest.approx(norm.sf(3.0), rel=1e-12)
    assert "3.0 standard deviations" in evidence.message
    assert "2.0 are allowed" in evidence.message
    _, both = TailTest("gain", threshold=2.0, rate=0.01, two_sided=True).step(
        TailState(), Innovation("gain", -0.6, 0.2)
    )
    assert both is not None
    assert both.p_value == pytest.approx(2 * norm.sf(3.0), rel=1e-12)


# -- drift ------------------------------------------------------------------------------------------------------------

TARGET = 200.0


def warm_state() -> DriftState:
    """After twenty steps of noise: from here on the detector bets."""
    test, state = DriftTest(run_length=TARGET), DriftState()
    for loss in np.random.default_rng(99).normal(size=21):
        state, result, _ = test.step(state, float(loss))
        assert result is None
    return state


def bet_of(state: DriftState, b: float) -> float:
    """The loss at which the next bet is b, by the detector's own definition."""
    sigma = max(state.scale.deviation, 1e-12, 1e-3 * abs(state.lowest))
    return state.lowest + sigma * (MARGIN + b)


def run_length(rng: np.random.Generator, test: DriftTest, state: DriftState, kind: str, limit: int) -> int:
    """Steps to the first alarm under a null that E[x | past] = 0 describes exactly."""
    for step in range(1, limit + 1):
        if kind == "coin":
            b = 1.0 if rng.random() < 0.5 else -1.0
        elif kind == "rare rise":
            b = 1.0 if rng.random() < 0.1 else -1.0 / 9.0
        else:
            b = float(rng.uniform(-1, 1))
        state, _, evidence = test.step(state, bet_of(state, b))
        if evidence is not None:
            return step
    return limit


@pytest.mark.parametrize("kind", ["coin", "rare rise", "uniform"])
def test_run_length_to_a_false_alarm_is_at_least_the_stated_one(kind: str) -> None:
    """On the boundary of the null M - n is a martingale, so E[N] = E[M_N] >= the target: the hardest case there is."""
    rng, test, state = np.random.default_rng(1), DriftTest(run_length=TARGET), warm_state()
    lengths = np.array([run_length(rng, test, state, kind, 4000) for _ in range(300)])
    deviation = float(lengths.std() / math.sqrt(len(lengths)))
    assert float(lengths.mean()) > TARGET + norm.ppf(RARE) * deviation
    # Doob: P(alarm within t steps) <= E[M_t] / target = t / target.
    for early in (20, 50, 100):
        assert int((lengths <= early).sum()) <= binom.isf(RARE, len(lengths), early / TARGET)


def test_healthy_training_keeps_the_stated_run_length() -> None:
    """A noisy descent with plateaus: not the null's boundary but what the detector is for."""
    rng, test = np.random.default_rng(2), DriftTest(run_length=TARGET)
    alarms = steps = 0
    for _ in range(40):
        state = DriftState()
        for loss in 2.0 * np.exp(-np.arange(500) / 120) + rng.normal(0, 0.1, 500):
            state, result, evidence = test.step(state, float(loss))
            alarms, steps = alarms + (evidence is not None), steps + (result is not None)
    assert alarms <= binom.isf(RARE, steps, 1 / TARGET)


def test_one_bet_has_mean_at_most_one_under_the_null() -> None:
    rng, state = np.random.default_rng(3), warm_state()
    test = DriftTest(run_length=1e12)
    growth = []
    for _ in range(4000):
        b = 1.0 if rng.random() < 0.25 else -1.0 / 3.0
        before = state.wealth
        state, result, _ = test.step(state, bet_of(state, b))
        assert result is not None
        assert abs(result.x) <= 1.0
        assert result.x == pytest.approx(b, abs=1e-9)
        for rate, old, new in zip(RATES, before, state.wealth, strict=True):
            assert new == pytest.approx((1 + rate * result.x) * (old + 1), rel=1e-12)
        growth.append(result.x)
    # E L = 1 + lambda E x, so it is enough that x has mean zero: what it is judged by is known before the loss.
    assert abs(float(np.mean(growth))) < 5 * float(np.std(growth)) / math.sqrt(len(growth))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80))
def test_no_loss_can_make_the_wealth_negative_or_the_bet_exceed_one(losses: list[float]) -> None:
    test, state = DriftTest(run_length=100.0), DriftState()
    for loss in losses:
        state, result, evidence = test.step(state, loss)
        assert min(state.wealth) >= 0
        if result is not None:
            assert -1 <= result.x <= 1
            assert result.alarm == (result.statistic >= 100.0) == (evidence is not None)
            if evidence is not None:
                assert evidence.e_value == result.statistic
                assert not any(state.wealth)


def delay(rng: np.random.Generator, shift: float, target: float) -> int:
    test, state = DriftTest(run_length=target), DriftState()
    for _ in range(300):
        state, _, evidence = test.step(state, float(rng.normal()))
    state = state._replace(wealth=(0.0,) * len(RATES))
    for step in range(1, 5000):
        state, _, evidence = test.step(state, float(rng.normal(shift)))
        if evidence is not None:
            return step
    return 5000


def test_delay_falls_with_the_shift_and_follows_the_theory() -> None:
    """Expected delay at most (ln target + ln 4 + overshoot) / growth rate of the best bet in the mixture."""
    target, shifts = 1000.0, (1.5, 2.5, 4.0)
    means = []
    rng = np.random.default_rng(4)
    for shift in shifts:
        means.append(float(np.mean([delay(rng, shift, target) for _ in range(30)])))
        # The lowest level of 300 steps lies about 0.4 deviations below the mean.
        bets = np.clip(np.random.default_rng(5).normal(shift + 0.4 - MARGIN, 1.0, 20_000), -1, 1)
        growth = max(float(np.log1p(rate * bets).mean()) for rate in RATES)
        theory = math.log(len(RATES) * target) / growth
        assert 0.25 * theory < means[-1] < 1.3 * theory + 5
    assert all(a > b for a, b in pairwise(means))


def test_a_large_shift_is_found_within_the_deterministic_bound() -> None:
    """Once every bet is won, M grows by 1 + max(RATES) a step, so the delay is at most ln(4 target) / ln(1.4)."""
    for target in (200.0, 20_000.0):
        worst = math.ceil(math.log(len(RATES) * target) / math.log1p(max(RATES)))
        assert delay(np.random.default_rng(6), 30.0, target) <= worst


def test_after_an_alarm_the_present_level_is_the_reference() -> None:
    rng, test, state, alarms = np.random.default_rng(7), DriftTest(run_length=1000.0), DriftState(), []
    for step in range(2000):
        state, result, evidence = test.step(state, float(rng.normal(0.0 if step < 500 else 5.0)))
        if evidence is not None:
            alarms.append(step)
            assert result is not None
            assert state.lowest == state.level
    # The level still rises towards the new plateau when the first alarm comes; then it is quiet.
    assert 500 < alarms[0] < 560
    assert len([a for a in alarms if a > 700]) <= 2


@given(st.floats(1e-3, 1e3))
def test_drift_does_not_depend_on_the_unit(unit: float) -> None:
    def run(scale: float) -> list[DriftResult]:
        rng, test, state, found = np.random.default_rng(8), DriftTest(run_length=50.0), DriftState(), []
        for step in range(120):
            state, result, _ = test.step(state, scale * float(1.0 + rng.normal(0, 0.2) + 0.01 * max(0, step - 60)))
            if result is not None:
                found.append(result)
        return found

    for a, b in zip(run(1.0), run(unit), strict=True):
        assert b.x == pytest.approx(a.x, abs=1e-9)
        assert b.statistic == pytest.approx(a.statistic, rel=1e-6)
        assert (b.alarm, b.reset) == (a.alarm, a.reset)


def test_a_loss_that_never_changes_is_no_drift() -> None:
    test, state = DriftTest(run_length=50.0), DriftState()
    for _ in range(500):
        state, _, evidence = test.step(state, 0.7)
        assert evidence is None
    assert state.scale == Scale(0.0, 499)


# -- learning-rate excursion ------------------------------------------------------------------------------------------


def excursions(rates: list[float], warm: int = 10) -> list[int]:
    test, state, found = LearningRateExcursion(), ExcursionState(), []
    for step, rate in enumerate(rates):
        if step < warm:
            state = test.learn(state, (rate,))
        else:
            state, evidence = test.step(state, (rate,))
            if evidence is not None:
                found.append(step)
    return found


def test_schedules_are_no_excursions() -> None:
    cosine = [0.1 * (0.05 + 0.95 * (1 + math.cos(math.pi * t / 400)) / 2) for t in range(400)]
    restarts = [0.1 * (1 + math.cos(math.pi * (t % 100) / 100)) / 2 for t in range(400)]
    slow = [0.001 * GROWTH**t for t in range(400)]
    assert excursions(cosine) == excursions(restarts) == excursions(slow) == []


def test_a_spike_and_a_creep_are_excursions() -> None:
    assert excursions([0.1] * 50 + [5.0] * 5 + [0.1] * 50) == [50]
    creep = excursions([0.1] * 50 + [0.1 * 1.03**t for t in range(1, 150)])
    # The ratio grows by 1.03 / 1.01 a step, so it passes RATIO after ln RATIO / ln(1.03 / 1.01) steps, then again.
    first = 50 + math.ceil(math.log(RATIO) / math.log(1.03 / GROWTH)) - 1
    assert abs(creep[0] - first) <= 1
    assert all(later - earlier >= 20 for earlier, later in pairwise(creep))


@given(st.lists(st.floats(1e-6, 10.0), min_size=12, max_size=60), st.floats(1e-3, 1e3))
def test_excursions_do_not_depend_on_the_unit(rates: list[float], unit: float) -> None:
    near = any(abs(a / b / RATIO**k - 1) < 1e-6 for a in rates for b in rates for k in range(1, 8))
    assume(not near)
    assert excursions(rates) == excursions([unit * r for r in rates])


def test_new_param_groups_and_zero_rates_are_no_error() -> None:
    test = LearningRateExcursion()
    state = test.learn(ExcursionState(), (0.1,))
    state, evidence = test.step(state, (0.1, 5.0))
    assert evidence is None
    state, evidence = test.step(state, (0.1, 5.0))
    assert evidence is None
    frozen = test.learn(ExcursionState(), (0.0,))
    assert test.ratio(frozen, (0.0,)) == 1.0
    assert test.ratio(ExcursionState(), (0.1,)) == 1.0
    _, evidence = test.step(frozen, (0.1,))
    assert evidence is not None


# -- paired test ------------------------------------------------------------------------------------------------------


def test_paired_test_has_its_size() -> None:
    rng, level, runs = np.random.default_rng(9), 0.05, 3000
    before = rng.gamma(2.0, 0.5, 128)
    fired = sum(paired_test(before + rng.normal(0, 0.3, 128), before, level=level).fired for _ in range(runs))
    # A normal quantile for a t statistic of 127 degrees of freedom: 5.1 % instead of 5 %.
    low, high = binom.ppf(RARE, runs, 0.045), binom.isf(RARE, runs, 0.0515)
    assert low < fired <= high


def test_paired_test_has_the_power_of_its_theory() -> None:
    rng, level, runs, shift, spread, n = np.random.default_rng(10), 1e-3, 1000, 0.08, 0.3, 128
    before = rng.gamma(2.0, 0.5, n)
    fired = sum(paired_test(before + rng.normal(shift, spread, n), before, level=level).fired for _ in range(runs))
    power = float(norm.sf(norm.isf(level) - shift * math.sqrt(n) / spread))
    assert abs(fired / runs - power) < 0.06
    # What pairing buys: against two independent means the same shift would hardly ever be seen.
    unpaired = shift / math.sqrt((before.var() * 2 + spread**2) / n)
    assert float(norm.sf(norm.isf(level) - unpaired)) < 0.1 * power


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=3, max_size=40),
    st.randoms(use_true_random=False),
)
def test_paired_statistic_does_not_depend_on_the_order_of_examples(
    pairs: list[tuple[float, float]], random: np.random.Generator
) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)
    one, two = np.array(pairs).T, np.array(shuffled).T
    first, second = paired_test(one[0], one[1]), paired_test(two[0], two[1])
    assert second.statistic == pytest.approx(first.statistic, rel=1e-9, nan_ok=True)
    assert paired_standard_error(two[0], two[1]) == pytest.approx(paired_standard_error(one[0], one[1]), rel=1e-9)


def test_paired_statistic_is_the_textbook_t() -> None:
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(11)
    a, b = rng.normal(1.1, 1.0, 50), rng.normal(1.0, 1.0, 50)
    evidence = paired_test(a, b)
    assert evidence.statistic == pytest.approx(float(ttest_rel(a, b).statistic), rel=1e-12)
    assert evidence.p_value == pytest.approx(float(norm.sf(evidence.statistic)), rel=1e-9)


def test_equal_losses_are_no_evidence_and_a_constant_rise_is_certain() -> None:
    losses = np.linspace(0.5, 1.0, 20)
    same: Evidence = paired_test(losses, losses)
    assert (same.statistic, same.fired) == (0.0, False)
    rise = paired_test(losses + 0.25, losses)
    assert rise.fired
    assert rise.statistic > 1e6
    fall = paired_test(losses - 0.25, losses)
    assert not fall.fired


# --- fusion -----------------------------------------------------------------------------------------------------------


def test_the_fused_detector_keeps_its_run_length_when_thresholds_are_exceeded_as_calibrated() -> None:
    """At the edge of its null: exceedances as likely as stated, and the same in all channels."""
    rng, stated, lengths = np.random.default_rng(21), 100.0, []
    channels = ("a", "b", "c")
    test = FusionTest(channels, {name: ((0.01, 0.99), (0.001, 0.999)) for name in channels}, run_length=stated)
    for _ in range(150):
        state, steps, alarm = FusionState(), 0, None
        while alarm is None and steps < 20_000:
            steps += 1
            shared = float(rng.uniform())
            state, alarm = test.step(state, (shared, shared, None if steps % 3 else shared))
        lengths.append(steps)
    mean, error = np.mean(lengths), np.std(lengths) / math.sqrt(len(lengths))
    assert mean + 3 * error >= stated


def test_fusion_sees_five_deviations_again_and_again_that_no_tail_test_sees(tmp_path: Path) -> None:
    rng = np.random.default_rng(22)
    pairs = load("default").pairs()
    assert set(pairs) == set(CHANNELS)
    levels = {
        name: tuple((1 - level, q) for level, q in known if 0.98 < level < 0.9995) for name, known in pairs.items()
    }
    test, state, seen = FusionTest(CHANNELS, levels, run_length=20_000.0), FusionState(), None
    for step in range(200):
        # Buffers are calibrated far below a deviation; of the others three see the same shift.
        loss, gradient, gain, trajectory = 0.9 * rng.normal(size=4) + (4.0 if step >= 150 else 0.0)
        state, evidence = test.step(state, (loss, gradient, gain, None, trajectory))
        if evidence is not None:
            seen = step
            break
    assert seen is not None
    assert 150 <= seen <= 160


def test_calibration_by_name_reaches_the_journal_and_its_replay(tmp_path: Path) -> None:
    plant = MLPPlant(seed=0)
    detectors = (*Settings().detectors, "fusion")
    settings = Settings(calibration="default", detectors=detectors, mode="observe")
    with Supervisor(plant.model, plant.probe_loader, settings=settings, run_dir=tmp_path / "run") as guard:
        for _ in range(60):
            plant.step_loss(next(plant.loader)).backward()
            plant.optimizer.step()
            plant.optimizer.zero_grad()
            guard.update()
        assert guard.settings.calibration == load("default").pairs()
    assert replay(tmp_path / "run").identical
    with pytest.raises(ConfigurationError, match="set calibration="):
        Settings(detectors=("fusion",))
    with pytest.raises(ConfigurationError, match="still a name"):
        Engine(settings)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Supervisor(plant.model, plant.probe_loader, settings=Settings(calibration=str(tmp_path / "none.json")))
