"""Trend, trajectory and probe filters, and the noise scale that they share.

Oracles: filterpy 2.0 with fixed noise and no clipping (rtol 1e-10: its Joseph form rounds otherwise), the matrix filter
written out below (1e-10), closed forms (1e-12), and for statistical statements seeded Monte Carlo within bounds that a
right filter leaves once in a million seeds (chi-square) or that are named beside the assertion. Metamorphic relations
(units, rotation of the sketch, clock) hold to rounding.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, ortho_group

from kalmanguard.estimators import probe as probe_module
from kalmanguard.estimators import trajectory as trajectory_module
from kalmanguard.estimators import trend as trend_module
from kalmanguard.estimators.bank import EstimatorBank, Estimators
from kalmanguard.estimators.noise import CLIP, Scale, track
from kalmanguard.estimators.probe import ProbeFilter, ProbeState
from kalmanguard.estimators.trajectory import TrajectoryFilter, TrajectoryInnovation, TrajectoryState
from kalmanguard.estimators.trend import TrendFilter, TrendState
from kalmanguard.records import FloatArray, Innovation, Measurement

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


# -- the noise scale --------------------------------------------------------------------------------------------------


def test_scale_starts_as_an_ordinary_mean() -> None:
    rng = np.random.default_rng(0)
    scale, data = Scale(), rng.uniform(1.0, 2.0, 30)  # nothing to clip
    for value in data:
        scale = track(scale, value, 100)
    assert scale.seen == 30
    assert scale.deviation == math.sqrt(scale.variance)
    assert scale.variance == pytest.approx(float(np.mean(data**2)), rel=1e-12)


def test_scale_of_gaussian_innovations_is_unbiased() -> None:
    rng = np.random.default_rng(1)
    finals = []
    for _ in range(60):
        scale = Scale()
        for value in rng.normal(0, 2.5, 600):
            scale = track(scale, value, 100)
        finals.append(scale.variance)
    # Clipping at 3 deviations takes 0.3 % off a square's mean; the mean of 60 runs has a standard error of 1.3 %.
    assert float(np.mean(finals)) == pytest.approx(2.5**2, rel=0.06)


@given(st.lists(st.floats(-10, 10), min_size=4, max_size=50), st.floats(10.0, 1e12))
def test_one_outlier_raises_the_variance_by_a_bounded_factor(data: list[float], outlier: float) -> None:
    scale = Scale()
    for value in data:
        scale = track(scale, value, 100)
    after = track(scale, outlier, 100)
    weight = max(1 / 100, 1 / after.seen)
    assert after.variance <= scale.variance * (1 + weight * (CLIP**2 - 1)) * (1 + 1e-12)
    assert track(scale, -outlier, 100) == after


@given(values, st.floats(1e-3, 1e3))
def test_scale_has_the_units_of_the_signal(data: list[float], unit: float) -> None:
    plain, scaled = Scale(), Scale()
    for value in data:
        plain, scaled = track(plain, value, 20), track(scaled, unit * value, 20)
    assert scaled.variance == pytest.approx(unit**2 * plain.variance, rel=1e-9)


# -- trend ------------------------------------------------------------------------------------------------------------


def run_trend(trend: TrendFilter, data: FloatArray) -> tuple[TrendState, list[Innovation]]:
    state, found = TrendState(), []
    for value in data:
        state, innovation = trend.step(state, float(value))
        found.append(innovation)
    return state, found


@pytest.mark.parametrize(("level_noise", "slope_noise"), [(0.01, 1e-6), (0.3, 0.01), (0.0, 1e-3)])
def test_trend_equals_filterpy_with_fixed_noise_and_no_clipping(
    monkeypatch: pytest.MonkeyPatch, level_noise: float, slope_noise: float
) -> None:
    from filterpy.kalman import KalmanFilter

    monkeypatch.setattr(trend_module, "CLIP", math.inf)
    rng = np.random.default_rng(2)
    data = 3.0 - 0.01 * np.arange(300) + rng.normal(0, 0.2, 300)
    trend, state = TrendFilter("loss", level_noise=level_noise, slope_noise=slope_noise), TrendState()
    state, first = trend.step(state, data[0])
    assert first.value == 0.0
    kf = KalmanFilter(dim_x=2, dim_z=1)
    kf.x, kf.P = np.array([data[0], 0.0]), np.diag([1.0, 0.01])
    kf.F, kf.H, kf.R = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 0.0]]), np.array([[1.0]])
    kf.Q = np.diag([level_noise, slope_noise])
    for value in data[1:]:
        kf.predict()
        prior = kf.P.copy()
        kf.update(value)
        spread, gain, slope_gain = trend._gains[state.age]
        state, innovation = trend.step(state, float(value))
        assert spread**2 == pytest.approx(prior[0, 0] + 1.0, rel=1e-10)
        np.testing.assert_allclose([gain, slope_gain], kf.K[:, 0], rtol=1e-10, atol=1e-14)
        assert innovation.value == pytest.approx(float(kf.y[0]), rel=1e-10, abs=1e-12)
        np.testing.assert_allclose([state.level, state.slope], kf.x, rtol=1e-10, atol=1e-12)


def test_normalised_innovations_of_a_matched_trend_have_unit_variance() -> None:
    """Consistency of the adaptive scale, from data of the very model that the filter assumes."""
    rng = np.random.default_rng(3)
    level_noise, total, count = 0.2, 0.0, 0
    for _ in range(20):
        level = rng.normal(0, 3.0, 1)[0] + rng.normal(0, 0.3 * level_noise**0.5, 600).cumsum()
        _, found = run_trend(
            TrendFilter("x", level_noise=level_noise, slope_noise=0.0), level + rng.normal(0, 0.3, 600)
        )
        scores = np.array([i.normalised for i in found[200:]])
        total, count = total + float((scores**2).sum()), count + len(scores)
    # The scale is itself estimated from 100 innovations, which adds 2 % to the mean square and widens its spread.
    low, high = chi2.ppf([1e-4, 1 - 1e-4], count) / count
    assert 0.95 * low < total / count < 1.08 * high


def test_a_mismatched_trend_is_inconsistent() -> None:
    """White innovations are what the adaptive scale cannot fake: a filter that is too slow has correlated ones."""
    rng = np.random.default_rng(4)
    walk = rng.normal(0, 1.0, 3000).cumsum() + rng.normal(0, 0.3, 3000)

    def correlation(level_noise: float) -> float:
        _, found = run_trend(TrendFilter("x", level_noise=level_noise, slope_noise=0.0), walk)
        nu = np.array([i.value for i in found[200:]])
        return float(np.corrcoef(nu[1:], nu[:-1])[0, 1])

    bound = 5 / math.sqrt(2800)
    assert abs(correlation(1.0 / 0.09)) < bound
    assert correlation(0.01) > bound


@given(st.lists(st.floats(-3, 3), min_size=8, max_size=40), st.floats(10, 1e9))
def test_an_outlier_moves_the_trend_by_a_bounded_amount(data: list[float], outlier: float) -> None:
    trend = TrendFilter("loss", floor=1e-3)
    state, _ = run_trend(trend, np.array(data))
    far, seen = trend.step(state, outlier)
    further, same = trend.step(state, 2 * outlier)
    # Beyond three deviations the size does not matter to the filter, while the evidence keeps it.
    assert far == further
    assert same.value > 1.9 * seen.value - 10
    assert seen.scale == same.scale


def test_a_second_outlier_is_as_visible_as_the_first() -> None:
    rng = np.random.default_rng(5)
    trend = TrendFilter("loss")
    state, _ = run_trend(trend, rng.normal(2.0, 0.1, 300))
    scores = []
    for _ in range(3):
        state, innovation = trend.step(state, 12.0)
        scores.append(innovation.normalised)
    assert min(scores) > 0.7 * scores[0] > 30


@given(st.floats(1e-4, 1e4), st.floats(-1e3, 1e3))
def test_trend_does_not_depend_on_units_or_origin(unit: float, origin: float) -> None:
    rng = np.random.default_rng(6)
    data = rng.normal(size=60)
    _, plain = run_trend(TrendFilter("loss"), data)
    _, other = run_trend(TrendFilter("loss"), unit * data + unit * origin)
    for a, b in zip(plain[2:], other[2:], strict=True):
        assert b.normalised == pytest.approx(a.normalised, rel=1e-6, abs=1e-6)


def test_floors_bound_what_noise_may_be_credited_with() -> None:
    _, constant = run_trend(TrendFilter("x", floor=0.05), np.full(50, 3.0))
    assert {i.scale for i in constant[1:]} == {0.05}
    _, relative = run_trend(TrendFilter("x", floor_frac=1e-2), np.full(50, 300.0))
    assert relative[-1].scale == pytest.approx(3.0)


def test_trend_is_pure() -> None:
    trend = TrendFilter("loss")
    state, _ = run_trend(trend, np.random.default_rng(7).normal(size=30))
    before = repr(state)
    assert trend.step(state, 1.0) == trend.step(state, 1.0)
    assert repr(state) == before


# -- trajectory -------------------------------------------------------------------------------------------------------


def run_trajectory(
    data: FloatArray, rates: FloatArray | None = None
) -> tuple[TrajectoryState, list[TrajectoryInnovation | None]]:
    flight, state, found = TrajectoryFilter(), TrajectoryState(), []
    for index, velocity in enumerate(data):
        state, innovation = flight.step(state, velocity, 0.1 if rates is None else float(rates[index]))
        found.append(innovation)
    return state, found


def known(found: list[TrajectoryInnovation | None]) -> list[TrajectoryInnovation]:
    return [i for i in found if i is not None]


def test_trajectory_equals_filterpy_with_one_covariance_for_k_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from filterpy.kalman import KalmanFilter

    monkeypatch.setattr(trajectory_module, "CLIP", math.inf)
    rng = np.random.default_rng(8)
    k, n = 64, 300
    rates = 0.1 * (1.1 + np.cos(np.arange(n) / 40))
    data = rates[:, None] * (rng.normal(size=k) + rng.normal(size=(n, k)))
    kf = KalmanFilter(dim_x=1, dim_z=1)
    kf.x, kf.P = (data[0] / rates[0])[None].copy(), np.array([[1.0]])
    kf.F, kf.H, kf.R = np.array([[1.0]]), np.array([[1.0]]), np.array([[1.0]])
    kf.Q = np.array([[trajectory_module._DRIFT]])
    flight, state = TrajectoryFilter(), TrajectoryState()
    state, _ = flight.step(state, data[0], float(rates[0]))
    for velocity, rate in zip(data[1:], rates[1:], strict=True):
        kf.predict()
        kf.update((velocity / rate)[None], H=kf.H)
        state, _ = flight.step(state, velocity, float(rate))
        assert state.direction is not None
        np.testing.assert_allclose(state.direction, kf.x[0], rtol=1e-10, atol=1e-12)
        assert state.variance == pytest.approx(float(kf.P[0, 0]), rel=1e-10)


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_effective_rank_is_that_of_the_noise(rank: int) -> None:
    """Noise in r of k dimensions has 2 (E q)^2 / Var q = r, whatever the rotation."""
    rng = np.random.default_rng(9)
    basis = ortho_group.rvs(64, random_state=1)[:rank]
    _, found = run_trajectory(rng.normal(size=(3000, rank)) @ basis)
    ranks = np.array([i.rank for i in known(found)[200:]])
    # The variance of q from 100 values of heavy-tailed q is known to about 30 %.
    assert 0.6 * rank < float(np.median(ranks)) < 1.7 * rank + 0.5


@pytest.mark.parametrize("rank", [3, 16, 64])
def test_normal_scores_of_low_rank_noise_are_about_normal(rank: int) -> None:
    rng = np.random.default_rng(10)
    basis = ortho_group.rvs(64, random_state=2)[:rank]
    _, found = run_trajectory(rng.normal(size=(4000, rank)) @ basis)
    scores = np.array([i.normalised for i in known(found)[300:]])
    assert abs(float(np.mean(scores))) < 0.15
    assert 0.8 < float(np.std(scores)) < 1.25
    # A normal score beyond 4 is a one in 30,000 event; that k coordinates were chi-square with k degrees of freedom
    # would put every fifth step of low-rank noise beyond the 99.9 % point.
    assert float(np.mean(scores > 4)) < 0.005


def test_a_wrong_velocity_is_rejected_by_its_score() -> None:
    rng = np.random.default_rng(11)
    flight, state = TrajectoryFilter(), TrajectoryState()
    for velocity in rng.normal(size=(300, 64)):
        state, _ = flight.step(state, velocity, 1.0)
    # From a healthy step to one twice as noisy to a kick: monotone, and the kick cannot be missed.
    healthy = flight.step(state, rng.normal(size=64), 1.0)[1]
    noisy = flight.step(state, 2.5 * rng.normal(size=64), 1.0)[1]
    kick = flight.step(state, 50 * rng.normal(size=64), 1.0)[1]
    assert healthy is not None
    assert noisy is not None
    assert kick is not None
    assert healthy.normalised < 4 < noisy.normalised < kick.normalised
    assert kick.normalised > 50


@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_rotation_and_units_of_the_sketch_do_not_matter(seed: int, unit: float) -> None:
    rng = np.random.default_rng(12)
    data = rng.normal(size=(40, 12)) * np.linspace(0.1, 3, 12)
    rotation = ortho_group.rvs(12, random_state=seed)
    plain_state, plain = run_trajectory(data)
    turned_state, turned = run_trajectory(unit * data @ rotation)
    for a, b in zip(known(plain), known(turned), strict=True):
        assert b.nis == pytest.approx(a.nis, rel=1e-8)
        assert b.rank == pytest.approx(a.rank, rel=1e-6)
        assert b.normalised == pytest.approx(a.normalised, rel=1e-6, abs=1e-6)
    assert turned_state.length == pytest.approx(unit * plain_state.length, rel=1e-8)


def test_a_schedule_causes_no_innovation() -> None:
    rng = np.random.default_rng(13)
    directions = rng.normal(size=32) + rng.normal(size=(200, 32))
    rates = np.concatenate([np.linspace(1e-3, 0.1, 50), 0.1 * np.cos(np.linspace(0, 1.5, 100)), np.full(50, 5.0)])
    constant_state, constant = run_trajectory(directions, np.ones(200))
    scheduled_state, scheduled = run_trajectory(rates[:, None] * directions, rates)
    for a, b in zip(constant, scheduled, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert b.normalised == pytest.approx(a.normalised, rel=1e-9)
    assert scheduled_state.length == pytest.approx(constant_state.length, rel=1e-9)


def test_expected_length_is_the_root_mean_square_of_the_steps() -> None:
    rng = np.random.default_rng(15)
    drift = rng.normal(size=16)
    data = drift + rng.normal(size=(2000, 16))
    state, _ = run_trajectory(data, np.ones(2000))
    lengths = float(np.mean((data[1000:] ** 2).sum(1)))
    assert state.length == pytest.approx(math.sqrt(lengths), rel=0.15)


def test_speed_is_predicted_also_for_steps_that_the_sketch_leaves_out() -> None:
    """The clock of the probe does not see the step that it predicts, does not wait for the sketch, follows the rate."""
    rng = np.random.default_rng(14)
    bank, e = EstimatorBank(), Estimators()

    def measured(step: int, velocity: FloatArray | None, rate: float = 0.1, veto: str | None = None) -> Measurement:
        return Measurement(step=step, learning_rates=(rate,), velocity=velocity, veto=veto)

    for step in range(50):
        e, _ = bank.step(e, measured(step, rng.normal(size=16)))
    calm = bank.step(e, measured(50, rng.normal(size=16)))[1].speed
    assert calm > 0
    assert bank.step(e, measured(50, 1e6 * rng.normal(size=16)))[1].speed == calm
    assert bank.step(e, measured(50, None))[1].speed == calm
    assert bank.step(e, measured(50, None, rate=0.2))[1].speed == pytest.approx(2 * calm)
    assert bank.step(e, measured(50, None, veto="nonfinite"))[1].speed == 0.0


def test_an_outlier_does_not_teach_the_filter_to_expect_outliers() -> None:
    rng = np.random.default_rng(16)
    state, _ = run_trajectory(rng.normal(size=(200, 16)))
    after, _ = TrajectoryFilter().step(state, 1e9 * rng.normal(size=16), 0.1)
    assert after.energy < 1.2 * state.energy
    assert after.direction is not None
    assert state.direction is not None
    moved = float(np.linalg.norm(after.direction - state.direction))
    assert moved < 3 * math.sqrt(state.energy)


def test_trajectory_is_pure_and_survives_a_zero_learning_rate() -> None:
    rng = np.random.default_rng(17)
    state, _ = run_trajectory(rng.normal(size=(20, 8)))
    assert state.direction is not None
    before, velocity = state.direction.copy(), rng.normal(size=8)
    kept = velocity.copy()
    first, second = (TrajectoryFilter().step(state, velocity, 0.0) for _ in range(2))
    assert first[1] == second[1]
    assert first[0].direction is not None
    assert second[0].direction is not None
    assert first[0].direction.tobytes() == second[0].direction.tobytes()
    np.testing.assert_array_equal(state.direction, before)
    np.testing.assert_array_equal(velocity, kept)


def test_steps_that_repeat_exactly_are_no_error() -> None:
    """A run of full batches without momentum has no gradient noise at all: nothing divides by zero."""
    state, found = run_trajectory(np.ones((50, 8)))
    assert state.energy == 0.0
    assert all(i is None or math.isfinite(i.normalised) for i in found)


# -- probe ------------------------------------------------------------------------------------------------------------


def run_probe(paths: FloatArray, losses: FloatArray, *, floor: float = 1e-6) -> tuple[ProbeState, list[float]]:
    flight, state, errors = ProbeFilter(), ProbeState(), []
    for path, loss in zip(paths, losses, strict=True):
        state = flight.travel(state, float(path))
        ahead = flight.predict(state, floor)
        errors.append(math.nan if ahead is None else float(loss) - ahead.level)
        state = flight.update(state, float(loss), floor)
    return state, errors


def test_probe_equals_the_textbook_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "CLIP", math.inf)
    rng = np.random.default_rng(18)
    paths, losses = rng.uniform(0.5, 2.0, 80), 2.0 - 0.01 * np.arange(80) + rng.normal(0, 0.05, 80)
    flight, state = ProbeFilter(), ProbeState()
    x, P = np.array([losses[0], 0.0]), np.eye(2)
    H = np.array([1.0, 0.0])
    state = flight.update(flight.travel(state, paths[0]), losses[0], 1e-9)
    total = squares = 0.0
    for path, loss in zip(paths[1:], losses[1:], strict=True):
        dt = path * total / squares if squares else 1.0
        decay = probe_module._DECAY**dt
        reach = (decay - 1.0) / math.log(probe_module._DECAY)
        F = np.array([[1.0, reach], [0.0, decay]])
        q_slope = probe_module._SLOPE_NOISE * (1.0 - decay**2)
        x, P = F @ x, F @ P @ F.T + np.diag([probe_module._LEVEL_NOISE * dt + q_slope * reach**2 / 3, q_slope])
        state = flight.travel(flight.travel(state, 0.25 * path), 0.75 * path)
        ahead = flight.predict(state, 1e-9)
        assert ahead is not None
        assert ahead.level == pytest.approx(x[0], rel=1e-10)
        K = P @ H / (P[0, 0] + 1.0)
        x, P = x + K * (loss - x[0]), (np.eye(2) - np.outer(K, H)) @ P
        state = flight.update(state, loss, 1e-9)
        total = probe_module._FORGETTING * total + path
        squares = probe_module._FORGETTING * squares + path**2
        assert state.gaussian is not None
        assert state.gaussian.level == pytest.approx(x[0], rel=1e-10)
        assert state.gaussian.slope == pytest.approx(x[1], rel=1e-8, abs=1e-12)


def test_the_path_is_a_better_clock_than_the_number_of_probes() -> None:
    """A loss that falls along the path is better predicted by it than by the number of probes, at any odd times."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        paths = np.exp(rng.uniform(np.log(0.2), np.log(5.0), 200))
        losses = 5.0 - 0.02 * paths.cumsum()
        _, by_path = run_probe(paths, losses)
        _, by_step = run_probe(np.ones_like(paths), losses)
        assert float(np.std(by_path[60:])) < 0.9 * float(np.std(by_step[60:]))


def test_the_slope_is_damped_so_a_loss_that_levels_off_is_not_undershot() -> None:
    """Repeating the last probe is the forecast to beat; carrying the slope on undamped loses to it."""
    t = np.arange(0, 400, 20)
    losses = 0.1 + 2.2 * np.exp(-t / 60)
    _, errors = run_probe(np.ones(len(t)), losses)
    missed = np.abs(errors[5:])
    assert float(missed.mean()) < float(np.abs(np.diff(losses))[4:].mean())


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_units_of_path_and_loss_do_not_matter(path_unit: float, loss_unit: float) -> None:
    rng = np.random.default_rng(20)
    paths, losses = rng.uniform(0.5, 2.0, 40), rng.normal(size=40)
    _, plain = run_probe(paths, losses, floor=1e-6)
    _, other = run_probe(path_unit * paths, loss_unit * losses, floor=1e-6 * loss_unit)
    np.testing.assert_allclose(other[1:], loss_unit * np.array(plain[1:]), rtol=1e-7, atol=1e-9 * loss_unit)


def test_harm_is_clipped_and_a_fast_descent_is_followed() -> None:
    rng = np.random.default_rng(21)
    state, _ = run_probe(np.ones(40), 2.0 + rng.normal(0, 0.02, 40))
    flight = ProbeFilter()
    state = flight.travel(state, 1.0)
    ahead = flight.predict(state, 1e-6)
    assert ahead is not None
    assert ahead.ready
    worse, much_worse = flight.update(state, 10.0, 1e-6), flight.update(state, 1000.0, 1e-6)
    better, much_better = flight.update(state, 1.5, 1e-6), flight.update(state, 1.0, 1e-6)
    assert worse == much_worse
    assert worse.gaussian is not None
    assert worse.gaussian.level - ahead.level < 3 * ahead.deviation
    assert better.gaussian is not None
    assert much_better.gaussian is not None
    assert much_better.gaussian.level < better.gaussian.level < ahead.level - 0.1


def test_predicted_probes_of_a_noisy_descent_lie_within_their_deviation() -> None:
    rng = np.random.default_rng(22)
    inside = count = 0
    for _ in range(20):
        flight, state = ProbeFilter(), ProbeState()
        losses = 3.0 * np.exp(-np.arange(120) / 40) + rng.normal(0, 0.03, 120)
        for index, loss in enumerate(losses):
            state = flight.travel(state, float(rng.uniform(0.8, 1.2)))
            ahead = flight.predict(state, 1e-6)
            if index >= 30 and ahead is not None:
                inside += abs(loss - ahead.level) < 3 * ahead.deviation
                count += 1
            state = flight.update(state, float(loss), 1e-6)
    assert inside / count > 0.97


def test_no_prediction_before_the_first_probe_and_none_to_trust_before_the_third() -> None:
    flight, state = ProbeFilter(), ProbeState()
    assert flight.predict(state, 0.1) is None
    ready = []
    for loss in (3.0, 2.9, 2.8, 2.7, 2.6):
        state = flight.update(flight.travel(state, 1.0), loss, 0.1)
        ahead = flight.predict(state, 0.1)
        assert ahead is not None
        assert ahead.deviation >= 0.1
        ready.append(ahead.ready)
    assert ready == [False, False, False, True, True]


def test_a_run_that_stands_still_keeps_its_prediction() -> None:
    state, _ = run_probe(np.zeros(20), np.full(20, 1.5))
    ahead = ProbeFilter().predict(state, 1e-6)
    assert ahead is not None
    assert ahead.level == pytest.approx(1.5)
    assert math.isfinite(ahead.deviation)
