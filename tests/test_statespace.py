"""The one Kalman recursion of the package, against everything that computes the same thing.

Oracles, each an independent road to the same numbers:

=====================  =========  ====================================================================================
scalar closed form     1e-12      the steady state is a root of a quadratic; the recursion converges to it
textbook matrices      1e-12      F, H, Q, R written out below, on an ordinary model; 1e-9 over noise ratios of 1e9
one joint Gaussian     1e-9       all states and measurements at once, conditioned by a dense solve of size 3 n
filterpy 2.0           1e-10      its Joseph form rounds otherwise than our short form
statsmodels            1e-8       its compiled filter, at known variances and a known start
Monte Carlo            chi-square normalised innovations of a matched model are exactly chi-square, so the bounds are
                                  exact; a wrong Q, R or a bias must leave them
=====================  =========  ====================================================================================
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from kalmanguard.estimators.statespace import Covariance, Gaussian, gains, predict, update
from kalmanguard.records import FloatArray

STEPS = 200
#: Outside this central interval a matched filter falls once in a million seeds.
TAIL = 5e-7

noises = st.floats(1e-8, 10.0)
variances = st.floats(1e-6, 100.0)
steps = st.floats(0.01, 10.0)


def matrices(state: Gaussian[float]) -> tuple[FloatArray, FloatArray]:
    p = state.covariance
    return np.array([state.level, state.slope]), np.array([[p.level, p.cross], [p.cross, p.slope]])


def textbook(
    x: FloatArray, P: FloatArray, z: float, dt: float, Q: FloatArray, R: float, decay: float = 1.0
) -> tuple[FloatArray, FloatArray, float, float]:
    """One cycle as in any textbook: predict, then update; also the innovation and its variance."""
    F, H = np.array([[1.0, dt], [0.0, decay]]), np.array([1.0, 0.0])
    x, P = F @ x, F @ P @ F.T + Q
    innovation, S = z - H @ x, H @ P @ H + R
    K = P @ H / S
    return x + K * innovation, (np.eye(2) - np.outer(K, H)) @ P, float(innovation), float(S)


def cycle(
    state: Gaussian[float],
    z: float,
    dt: float,
    level_noise: float,
    slope_noise: float,
    noise: float = 1.0,
    decay: float = 1.0,
) -> tuple[Gaussian[float], float, float]:
    ahead = predict(state, dt, level_noise, slope_noise, decay=decay)
    innovation = z - ahead.level
    return update(ahead, innovation, noise), innovation, ahead.covariance.level + noise


@given(
    st.lists(st.tuples(st.floats(-5, 5), steps, noises, noises), min_size=1, max_size=30),
    variances,
    variances,
    st.floats(-0.99, 0.99),
    st.floats(1e-3, 10.0),
    st.floats(0.0, 1.0),
)
def test_recursion_equals_the_textbook_matrices(
    data: list[tuple[float, float, float, float]],
    level: float,
    slope: float,
    correlation: float,
    noise: float,
    decay: float,
) -> None:
    cross = correlation * math.sqrt(level * slope)
    state = Gaussian(0.5, -0.1, Covariance(level, cross, slope))
    x, P = matrices(state)
    for z, dt, level_noise, slope_noise in data:
        state, innovation, total = cycle(state, z, dt, level_noise, slope_noise, noise, decay)
        x, P, expected, S = textbook(x, P, z, dt, np.diag([level_noise, slope_noise]), noise, decay)
        mean, covariance = matrices(state)
        scale = 1.0 + np.abs(P).max() + np.abs(x).max()
        assert innovation == pytest.approx(expected, rel=1e-9, abs=1e-9 * scale)
        assert total == pytest.approx(S, rel=1e-9)
        np.testing.assert_allclose(mean, x, rtol=1e-9, atol=1e-9 * scale)
        np.testing.assert_allclose(covariance, P, rtol=1e-9, atol=1e-9 * scale)


def test_textbook_agreement_is_to_the_last_digits_on_an_ordinary_model() -> None:
    rng = np.random.default_rng(0)
    state = Gaussian(0.0, 0.0, Covariance(1.0, 0.0, 0.01))
    x, P = matrices(state)
    for z in rng.normal(size=STEPS).cumsum():
        state, _, _ = cycle(state, z, 1.0, 0.01, 1e-4)
        x, P, _, _ = textbook(x, P, z, 1.0, np.diag([0.01, 1e-4]), 1.0)
        mean, covariance = matrices(state)
        np.testing.assert_allclose(mean, x, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(covariance, P, rtol=1e-12, atol=1e-14)


def test_recursion_equals_one_joint_gaussian() -> None:
    """The filter's last mean and covariance are those of conditioning everything on everything at once."""
    rng = np.random.default_rng(1)
    n, dt, level_noise, slope_noise, noise = 12, 0.7, 0.3, 0.05, 0.8
    prior = np.array([[2.0, 0.3], [0.3, 0.5]])
    F, Q = np.array([[1.0, dt], [0.0, 1.0]]), np.diag([level_noise, slope_noise])
    # State at step t as a linear map of (x_0, w_1, ..., w_n).
    size = 2 * (n + 1)
    maps, latest = [], np.hstack([np.eye(2), np.zeros((2, 2 * n))])
    root = np.zeros((size, size))
    root[:2, :2] = prior
    for t in range(1, n + 1):
        latest = F @ latest
        latest[:, 2 * t : 2 * t + 2] += np.eye(2)
        root[2 * t : 2 * t + 2, 2 * t : 2 * t + 2] = Q
        maps.append(latest.copy())
    observed = np.vstack([m[0] for m in maps])
    z = rng.normal(size=n)
    start = np.concatenate([[1.0, -0.2], np.zeros(2 * n)])
    covariance_z = observed @ root @ observed.T + noise * np.eye(n)
    gain = maps[-1] @ root @ observed.T @ np.linalg.inv(covariance_z)
    mean = maps[-1] @ start + gain @ (z - observed @ start)
    covariance = maps[-1] @ root @ maps[-1].T - gain @ observed @ root @ maps[-1].T

    state = Gaussian(1.0, -0.2, Covariance(2.0, 0.3, 0.5))
    log_likelihood = 0.0
    for value in z:
        state, innovation, total = cycle(state, value, dt, level_noise, slope_noise, noise)
        log_likelihood -= 0.5 * (math.log(2 * math.pi * total) + innovation**2 / total)
    filtered, filtered_covariance = matrices(state)
    np.testing.assert_allclose(filtered, mean, rtol=1e-9)
    np.testing.assert_allclose(filtered_covariance, covariance, rtol=1e-9)
    # Innovations factorise the joint density: their likelihood is that of all measurements together.
    residual = z - observed @ start
    joint = -0.5 * (
        n * math.log(2 * math.pi)
        + np.linalg.slogdet(covariance_z)[1]
        + residual @ np.linalg.solve(covariance_z, residual)
    )
    assert log_likelihood == pytest.approx(joint, rel=1e-9)


@pytest.mark.parametrize(("level_noise", "slope_noise", "dt"), [(0.01, 1e-6, 1.0), (0.5, 0.1, 0.3), (0.0, 0.02, 2.0)])
def test_recursion_equals_filterpy(level_noise: float, slope_noise: float, dt: float) -> None:
    from filterpy.kalman import KalmanFilter

    rng = np.random.default_rng(2)
    kf = KalmanFilter(dim_x=2, dim_z=1)
    kf.x = np.array([0.2, 0.1])
    kf.P, kf.R = np.diag([1.0, 0.01]), np.array([[1.0]])
    kf.F, kf.H = np.array([[1.0, dt], [0.0, 1.0]]), np.array([[1.0, 0.0]])
    kf.Q = np.diag([level_noise, slope_noise])
    state = Gaussian(0.2, 0.1, Covariance(1.0, 0.0, 0.01))
    for z in rng.normal(size=STEPS).cumsum():
        kf.predict()
        kf.update(z)
        state, innovation, total = cycle(state, z, dt, level_noise, slope_noise)
        mean, covariance = matrices(state)
        np.testing.assert_allclose(mean, kf.x, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(covariance, kf.P, rtol=1e-10, atol=1e-14)
        assert innovation == pytest.approx(float(kf.y[0]), rel=1e-10, abs=1e-12)
        assert total == pytest.approx(float(kf.S[0, 0]), rel=1e-10)


def test_k_coordinates_share_one_covariance_as_in_filterpy() -> None:
    """In filterpy 2.0 the mean may be (d, k) when H is handed to `update`: one covariance serves all k columns."""
    from filterpy.kalman import KalmanFilter

    rng = np.random.default_rng(3)
    k = 64
    kf = KalmanFilter(dim_x=2, dim_z=1)
    kf.x = np.zeros((2, k))
    kf.P, kf.R = np.diag([1.0, 0.1]), np.array([[1.0]])
    kf.F, kf.H = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 0.0]])
    kf.Q = np.diag([0.02, 0.003])
    state: Gaussian[FloatArray] = Gaussian(np.zeros(k), np.zeros(k), Covariance(1.0, 0.0, 0.1))
    for z in rng.normal(size=(STEPS, k)).cumsum(axis=0):
        kf.predict()
        kf.update(z[None], H=kf.H)
        ahead = predict(state, 1.0, 0.02, 0.003)
        state = update(ahead, z - ahead.level)
        assert kf.x.shape == (2, k)
        np.testing.assert_allclose(np.vstack([state.level, state.slope]), kf.x, rtol=1e-10, atol=1e-11)
        p = state.covariance
        np.testing.assert_allclose([[p.level, p.cross], [p.cross, p.slope]], kf.P, rtol=1e-10, atol=1e-14)


def test_k_coordinates_are_k_independent_filters() -> None:
    rng = np.random.default_rng(4)
    data = rng.normal(size=(50, 5))
    together: Gaussian[FloatArray] = Gaussian(data[0], np.zeros(5), Covariance(1.0, 0.0, 0.1))
    apart = [Gaussian(float(v), 0.0, Covariance(1.0, 0.0, 0.1)) for v in data[0]]
    for row in data[1:]:
        ahead = predict(together, 0.5, 0.1, 0.01)
        together = update(ahead, row - ahead.level)
        apart = [cycle(s, float(z), 0.5, 0.1, 0.01)[0] for s, z in zip(apart, row, strict=True)]
    assert together.level.tolist() == [s.level for s in apart]  # bitwise: the same operations in the same order
    assert together.slope.tolist() == [s.slope for s in apart]
    assert all(s.covariance == together.covariance for s in apart)


@pytest.mark.parametrize(("trend", "sigmas"), [("llevel", (0.7, 0.2)), ("lltrend", (0.7, 0.2, 0.01))])
def test_recursion_equals_statsmodels(trend: str, sigmas: tuple[float, ...]) -> None:
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    rng = np.random.default_rng(5)
    data = rng.normal(size=STEPS).cumsum() * 0.3 + rng.normal(size=STEPS)
    model = UnobservedComponents(data, trend)
    start = np.diag([2.0]) if trend == "llevel" else np.diag([2.0, 0.5])
    model.ssm.initialize_known(np.zeros(len(start)), start)
    model.ssm.loglikelihood_burn = 0
    result = model.filter(np.array(sigmas), return_ssm=True)

    noise, level_noise = sigmas[0], sigmas[1]
    slope_noise = sigmas[2] if trend == "lltrend" else 0.0
    state = Gaussian(0.0, 0.0, Covariance(2.0, 0.0, 0.5 if trend == "lltrend" else 0.0))
    innovations, totals, levels = [], [], []
    for index, z in enumerate(data):
        # statsmodels states its start as the prediction of the first value; ours predicts before every value.
        ahead = state if index == 0 else predict(state, 1.0, level_noise, slope_noise)
        innovations.append(z - ahead.level)
        totals.append(ahead.covariance.level + noise)
        state = update(ahead, innovations[-1], noise)
        levels.append(state.level)
    np.testing.assert_allclose(innovations, result.forecasts_error[0], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(totals, result.forecasts_error_cov[0, 0], rtol=1e-8)
    np.testing.assert_allclose(levels, result.filtered_state[0], rtol=1e-8, atol=1e-9)
    log_likelihood = -0.5 * sum(math.log(2 * math.pi * s) + i * i / s for i, s in zip(innovations, totals, strict=True))
    assert log_likelihood == pytest.approx(result.llf_obs.sum(), rel=1e-8)


@given(st.floats(0.01, 0.9))
def test_steady_state_is_an_exponential_moving_average(alpha: float) -> None:
    """With q = alpha^2 r / (1 - alpha) the gain is alpha, and the innovation variance S = r / (1 - alpha)."""
    state = Gaussian(0.0, 0.0, Covariance(1.0, 0.0, 0.0))
    average = 0.0
    rng = np.random.default_rng(0)
    for _ in range(int(40 / alpha)):
        state, _, total = cycle(state, 0.0, 1.0, alpha**2 / (1 - alpha), 0.0)
    assert total == pytest.approx(1 / (1 - alpha), rel=1e-12)
    assert state.covariance.level == pytest.approx(alpha, rel=1e-12)  # posterior variance in units of r is the gain
    for z in rng.normal(size=20):
        state, _, _ = cycle(state, z, 1.0, alpha**2 / (1 - alpha), 0.0)
        average += alpha * (z - average)
        assert state.level == pytest.approx(average, rel=1e-11, abs=1e-13)


def test_an_average_lags_a_descent_by_slope_over_alpha_and_the_trend_does_not() -> None:
    alpha, slope = 0.1, -0.01
    average = Gaussian(0.0, 0.0, Covariance(1.0, 0.0, 0.0))
    trend = Gaussian(0.0, 0.0, Covariance(1.0, 0.0, 1.0))
    for t in range(2000):
        average, lag, _ = cycle(average, slope * t, 1.0, alpha**2 / (1 - alpha), 0.0)
        trend, error, _ = cycle(trend, slope * t, 1.0, 0.01, 1e-4)
    assert lag == pytest.approx(slope / alpha, rel=1e-9)
    assert abs(error) < 1e-12


@given(st.lists(st.tuples(steps, noises, noises, st.floats(1e-6, 1e3)), min_size=1, max_size=60))
def test_covariance_stays_positive_semidefinite(data: list[tuple[float, float, float, float]]) -> None:
    state = Gaussian(0.0, 0.0, Covariance(1.0, 0.0, 0.01))
    for dt, level_noise, slope_noise, noise in data:
        state, _, _ = cycle(state, 0.0, dt, level_noise, slope_noise, noise)
        p = state.covariance
        assert min(p.level, p.slope) >= 0
        assert p.cross**2 <= p.level * p.slope * (1 + 1e-9)


@given(st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
def test_units_do_not_matter(unit: float, clock: float) -> None:
    """Losses in other units, and time in other units, give the same gains, and the same filter in those units."""
    rng = np.random.default_rng(6)
    plain = Gaussian(1.0, 0.1, Covariance(1.0, 0.2, 0.5))
    other = Gaussian(unit, 0.1 * unit / clock, Covariance(1.0, 0.2 / clock, 0.5 / clock**2))
    for z in rng.normal(size=30):
        plain, first, total = cycle(plain, z, 1.0, 0.1, 0.02)
        other, second, same_total = cycle(other, z * unit, clock, 0.1, 0.02 / clock**2)
        assert second == pytest.approx(unit * first, rel=1e-9, abs=1e-9 * unit)
        assert same_total == pytest.approx(total, rel=1e-9)


def test_update_without_information_changes_nothing() -> None:
    state = Gaussian(1.0, 2.0, Covariance(0.0, 0.0, 0.3))
    assert update(state, 5.0) == state


# -- consistency: normalised innovations of a matched model are chi-square, of a mismatched one they are not ----------

RUNS, LENGTH = 40, 100
LEVEL_NOISE, SLOPE_NOISE, NOISE = 0.2, 0.02, 1.0


def simulated(rng: np.random.Generator) -> FloatArray:
    """Draw one run of the model that the filter below assumes, its start included."""
    level, slope = rng.normal(0, 1.0), rng.normal(0, 0.3)
    values = []
    for _ in range(LENGTH):
        level, slope = level + slope + rng.normal(0, LEVEL_NOISE**0.5), slope + rng.normal(0, SLOPE_NOISE**0.5)
        values.append(level + rng.normal(0, NOISE**0.5))
    return np.array(values)


def total_nis(
    *, level_noise: float = LEVEL_NOISE, slope_noise: float = SLOPE_NOISE, noise: float = NOISE, bias: float = 0.0
) -> float:
    rng = np.random.default_rng(7)
    total = 0.0
    for _ in range(RUNS):
        state = Gaussian(0.0, 0.0, Covariance(1.0, 0.0, 0.09))
        for z in simulated(rng):
            ahead = predict(state, 1.0, level_noise, slope_noise)
            innovation = z + bias - ahead.level
            total += innovation**2 / (ahead.covariance.level + noise)
            state = update(ahead, innovation, noise)
            # The bias is one that jumps about, so that no filter can follow it.
            bias = -bias
    return total


LOW, HIGH = chi2.ppf([TAIL, 1 - TAIL], RUNS * LENGTH)


def test_matched_filter_is_consistent() -> None:
    assert LOW < total_nis() < HIGH


@pytest.mark.parametrize(
    ("wrong", "above"),
    [
        ({"noise": 2.0 * NOISE}, False),
        ({"noise": 0.5 * NOISE}, True),
        ({"level_noise": 10 * LEVEL_NOISE}, False),
        ({"level_noise": 0.0, "slope_noise": SLOPE_NOISE / 10}, True),
        ({"slope_noise": 30 * SLOPE_NOISE}, False),
        ({"bias": 0.7}, True),
    ],
)
def test_wrong_models_are_rejected(wrong: dict[str, float], above: bool) -> None:
    nis = total_nis(**wrong)
    assert nis > HIGH if above else nis < LOW


@given(noises, noises, variances, variances)
def test_gains_of_constant_noise_are_those_of_the_recursion_at_every_step(
    level_noise: float, slope_noise: float, level: float, slope: float
) -> None:
    prior = Covariance(level, 0.0, slope)
    table = gains(level_noise, slope_noise, prior)
    state = Gaussian(0.0, 0.0, prior)
    for step in range(min(len(table) + 50, 500)):
        ahead = predict(state, 1.0, level_noise, slope_noise)
        state = update(ahead, 1.0)
        expected = table[min(step, len(table) - 1)]
        assert expected.spread**2 == pytest.approx(ahead.covariance.level + 1.0, rel=1e-12)
        assert state.level - ahead.level == pytest.approx(expected.level, rel=1e-12)
        assert state.slope - ahead.slope == pytest.approx(expected.slope, rel=1e-9, abs=1e-12)
