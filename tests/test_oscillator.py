"""Damping and frequency of a noisy oscillation, its likelihood and its bound.

Oracles: the joint Gaussian of the values (likelihood), statsmodels' state-space likelihood, spectral derivatives by
finite differences (information), closed forms of the noise-free case, and simulated processes of known poles.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import toeplitz
from scipy.signal import lfilter
from scipy.stats import binom

from kalmanguard.analysis.cramer_rao import cramer_rao
from kalmanguard.analysis.free_decay import free_decay
from kalmanguard.analysis.noisy_autoregression import NoisyAutoregression, information, log_likelihood
from kalmanguard.analysis.oscillator import oscillator
from kalmanguard.analysis.second_order import Pair
from kalmanguard.analysis.yule_walker import modified_yule_walker
from kalmanguard.detectors.damping import second_order
from kalmanguard.errors import ConfigurationError
from kalmanguard.models.quadratic import HeavyBall


def process(damping, frequency, *, n=1000, snr=10.0, k=1, seed=0):
    rng = np.random.default_rng(seed)
    pair = Pair.of(damping, frequency)
    f, s = pair.coefficients()
    burn = int(20 / pair.decay)
    x = lfilter([1.0], [1.0, -f, -s], rng.normal(size=(n + burn, k)), axis=0)[burn:]
    power = NoisyAutoregression(f, s, 0.0).variances()[0]
    return x + rng.normal(size=(n, k)) * math.sqrt(power / snr)


MODELS = [
    NoisyAutoregression(1.6, -0.9, 0.7), NoisyAutoregression(1.9, -0.98, 30.0), NoisyAutoregression(-0.5, -0.4, 1e-6),
    NoisyAutoregression(1.4, -0.48, 1.0), NoisyAutoregression(0.5, 0.0, 2.0), NoisyAutoregression(0.0, 0.0, 1.0),
    NoisyAutoregression(0.0, -0.5, 1.0), NoisyAutoregression(0.2, 0.3, 5.0),
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("n", [3, 60])
def test_the_likelihood_is_the_joint_gaussian(model, n):
    values = np.random.default_rng(1).normal(size=(n, 2)) * [1.0, 3.0]
    variance, neighbour = model.variances()
    lags = [variance, neighbour]
    for _ in range(n):
        lags.append(model.phi_1 * lags[-1] + model.phi_2 * lags[-2])
    covariance = toeplitz(lags[:n]) + model.ratio * np.eye(n)
    expected = 0.0
    for column in values.T:
        scale = column @ np.linalg.solve(covariance, column) / n
        expected -= 0.5 * (np.linalg.slogdet(covariance)[1] + n * (math.log(2 * math.pi * scale) + 1.0))
    assert log_likelihood(model, values) == pytest.approx(expected, rel=1e-9)


def test_the_likelihood_is_statsmodels():
    from statsmodels.tsa.statespace.sarimax import SARIMAX

    values = process(0.1, 0.5, n=300)
    f, s = Pair.of(0.1, 0.5).coefficients()
    model = NoisyAutoregression(f, s, 2.0)
    stock = SARIMAX(values[:, 0], order=(2, 0, 0), measurement_error=True, concentrate_scale=False)
    scales = np.linspace(0.5, 2.0, 4001)
    best = max(float(stock.loglike([f, s, 2.0 * q, q])) for q in scales[::40])
    assert log_likelihood(model, values) == pytest.approx(best, abs=0.02)
    assert log_likelihood(model, values) >= best


@pytest.mark.parametrize("model", [m for m in MODELS if m.phi_2 and m.ratio > 1e-3])
def test_the_information_is_that_of_the_spectral_derivatives(model):
    angle = (np.arange(4096) + 0.5) * math.pi / 4096
    z = np.exp(-1j * angle)

    def density(parameters):
        f, s, r = parameters
        return np.log(1.0 / np.abs(1.0 - f * z - s * z * z) ** 2 + math.exp(r))

    at, h = np.array([model.phi_1, model.phi_2, math.log(model.ratio)]), 1e-6
    slopes = np.stack([(density(at + h * e) - density(at - h * e)) / (2 * h) for e in np.eye(3)])
    slopes -= slopes.mean(1, keepdims=True)
    np.testing.assert_allclose(information(model), 0.5 * slopes @ slopes.T / 4096, rtol=1e-5, atol=1e-8)


def test_without_noise_the_bound_is_that_of_an_autoregression():
    # The inverse information of (phi_1, phi_2) is [[1 - phi_2^2, -phi_1 (1 + phi_2)], [., 1 - phi_2^2]] / n, and
    # phi_2 = -exp(-2 zeta omega).
    pair = Pair.of(0.1, 0.5)
    f, s = pair.coefficients()
    slopes = pair.damping_slopes() @ np.linalg.inv(pair.slopes())
    covariance = slopes @ np.array([[1 - s * s, -f * (1 + s)], [-f * (1 + s), 1 - s * s]]) @ slopes.T / 1000
    whitest = cramer_rao(0.1, 0.5, n=1000, snr=1e9)
    np.testing.assert_allclose(whitest, np.sqrt(np.diag(covariance)), rtol=0.1)  # the noise is still to be told from 0
    assert whitest.damping > math.sqrt(covariance[0, 0])
    assert cramer_rao(0.1, 0.5, n=4000, snr=10.0).damping == pytest.approx(
        cramer_rao(0.1, 0.5, n=1000, snr=10.0)[0] / 2
    )
    assert cramer_rao(0.1, 0.5, n=1000, snr=1.0).damping > cramer_rao(0.1, 0.5, n=1000, snr=10.0).damping


@pytest.mark.parametrize("damping", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("frequency", [0.2, 1.5, 3.0])
def test_a_pair_is_itself_however_it_is_written(damping, frequency):
    pair = Pair.of(damping, frequency)
    assert (pair.damping, pair.frequency) == pytest.approx((damping, frequency))
    assert second_order(pair.poles) == pytest.approx((damping, frequency))
    roots = np.roots([1.0, *(-phi for phi in pair.coefficients())])
    assert sorted(roots.imag) == pytest.approx(sorted(z.imag for z in pair.poles))
    for derivative, of in (
        (pair.slopes(), Pair.coefficients),
        (pair.damping_slopes(), lambda p: (p.damping, p.frequency)),
    ):
        h = 1e-6
        by_decay = np.subtract(of(Pair(pair.decay + h, pair.angle)), of(Pair(pair.decay - h, pair.angle))) / (2 * h)
        by_angle = np.subtract(of(Pair(pair.decay, pair.angle + h)), of(Pair(pair.decay, pair.angle - h))) / (2 * h)
        np.testing.assert_allclose(derivative, np.stack([by_decay, by_angle], axis=1), rtol=1e-6, atol=1e-7)


def test_the_heavy_ball_is_critically_damped_where_the_page_says():
    for beta in (0.5, 0.9):
        ball = HeavyBall(curvatures=(0.999, 1.001), lr=(1.0 - math.sqrt(beta)) ** 2, momentum=beta)
        more, less = ball.damping_ratios()
        assert more > 1.0 > less > 0.99


def test_the_fit_is_the_top_of_the_likelihood():
    from scipy.optimize import minimize

    values = process(0.2, 0.7, seed=3)
    found = oscillator(values)
    centred = values - values.mean(0)

    def negative(x):
        pair = Pair(math.exp(x[0]), math.exp(x[1]))
        return -log_likelihood(NoisyAutoregression(*pair.coefficients(), math.exp(x[2])), centred)

    stock = minimize(negative, [math.log(0.1), math.log(0.7), 0.0], method="Nelder-Mead", options={"xatol": 1e-8})
    assert found.converged
    assert found.log_likelihood == pytest.approx(-stock.fun, abs=1e-4)
    best = Pair(math.exp(stock.x[0]), math.exp(stock.x[1]))
    assert found.damping.estimate == pytest.approx(best.damping, abs=1e-3)
    assert found.frequency.estimate == pytest.approx(best.frequency, abs=1e-3)


def study(damping, frequency, runs, *, n=1000, snr=10.0, seed=0):
    """Errors of (zeta, omega), which intervals cover, and how many are identified."""
    errors, covered, identified = [], [], 0
    for run in range(runs):
        found = oscillator(process(damping, frequency, n=n, snr=snr, seed=10_000 * seed + run))
        identified += found.identified
        if found.identified:
            errors.append((found.damping.estimate - damping, found.frequency.estimate - frequency))
            covered.append((
                found.damping.low <= damping <= found.damping.high,
                found.frequency.low <= frequency <= found.frequency.high,
            ))  # fmt: skip
    return np.array(errors), np.array(covered), identified


@pytest.mark.parametrize("frequency", [0.2, 0.5, 1.5])
def test_a_light_damping_is_known_almost_as_well_as_can_be(frequency):
    errors, covered, identified = study(0.1, frequency, 40, seed=int(10 * frequency))
    assert identified == 40
    # Half of the errors are below 1.2 times what the bound implies: a sign test, since 40 runs make a rough median.
    within = np.abs(errors) <= 1.2 * 0.6745 * np.array(cramer_rao(0.1, frequency, n=1000, snr=10.0))
    assert (within.sum(0) >= binom.ppf(1e-3, 40, 0.5)).all()
    assert (np.abs(errors).max(0) <= 5.0 * np.array(cramer_rao(0.1, frequency, n=1000, snr=10.0))).all()
    assert (covered.sum(0) >= binom.ppf(1e-3, 40, 0.95)).all()


def judge(damping, frequency, runs, *, seed=0):
    errors, covered, identified = study(damping, frequency, runs, seed=seed)
    assert identified >= 0.97 * runs
    typical = np.median(np.abs(errors), axis=0)
    bound = cramer_rao(damping, frequency, n=1000, snr=10.0)
    assert (typical <= 1.2 * 0.6745 * np.array(bound)).all()
    return typical, covered


@pytest.mark.slow
@pytest.mark.parametrize("damping", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_errors_are_those_of_the_bound_and_intervals_cover_at_their_rate(damping):
    typical, covered = judge(damping, 0.5, 500)
    assert damping > 0.1 or typical[0] < 0.02
    assert (np.abs(covered.mean(0) - 0.95) <= 0.02).all()


@pytest.mark.slow
@pytest.mark.parametrize("damping", [0.05, 0.3])
@pytest.mark.parametrize("frequency", [0.2, 1.0, 1.5])
def test_the_same_at_other_frequencies(damping, frequency):
    _, covered = judge(damping, frequency, 500, seed=1)
    low, high = binom.ppf([5e-4, 1 - 5e-4], len(covered), 0.95)
    assert ((low <= covered.sum(0)) & (covered.sum(0) <= high)).all()


def test_columns_that_share_poles_know_them_better_and_scales_do_not_matter():
    values = process(0.1, 0.5, n=400, k=8, seed=4)
    one, all_ = oscillator(values[:, 0]), oscillator(values * 10.0 ** np.arange(8))
    plain = oscillator(values)
    assert all_.damping == pytest.approx(plain.damping, rel=1e-4)
    assert all_.damping.low <= 0.1 <= all_.damping.high
    assert abs(all_.damping.estimate - 0.1) <= 3 * cramer_rao(0.1, 0.5, n=400, snr=10.0, columns=8).damping
    width, wide = (v.high - v.low for v in (all_.damping, one.damping))
    assert width < 0.6 * wide
    worth_two = oscillator(values, rank=2.0)
    assert worth_two.damping.high - worth_two.damping.low == pytest.approx(2 * width, rel=0.1)
    assert worth_two.evidence == pytest.approx(plain.evidence / 4)


def white(rng):
    return rng.normal(size=400)


def one_pole(rng):
    return lfilter([1.0], [1.0, -0.9], rng.normal(size=900))[500:] + 0.5 * rng.normal(size=400)


def overdamped(rng):
    return lfilter([1.0], np.poly([0.9, 0.7]), rng.normal(size=900))[500:] + 0.5 * rng.normal(size=400)


def random_walk(rng):
    return np.cumsum(rng.normal(size=400))


def alternating(rng):
    return lfilter([1.0], [1.0, 0.5], rng.normal(size=900))[500:]


@pytest.mark.parametrize("make", [white, one_pole, overdamped, random_walk, alternating])
def test_no_oscillation_is_identified_where_there_is_none(make):
    rng = np.random.default_rng(6)
    found = [oscillator(make(rng)) for _ in range(12)]
    assert sum(result.identified for result in found) <= binom.ppf(0.999, 12, 0.05)
    none = next(result for result in found if not result.identified)
    assert "no oscillation identified" in str(none)
    assert math.isnan(none.damping.estimate)
    assert none.damping.high == math.inf


@pytest.mark.parametrize(("damping", "frequency"), [(0.05, 0.4), (0.3, 0.7), (0.01, 2.0)])
def test_a_free_decay_gives_its_poles(damping, frequency):
    pair = Pair.of(damping, frequency)
    steps = np.arange(80)
    decay = np.exp(-pair.decay * steps)[:, None] * np.cos(pair.angle * steps[:, None] + [0.3, 1.9])
    np.testing.assert_allclose(free_decay(decay), pair.poles, atol=1e-9)
    noisy = decay + 1e-3 * np.random.default_rng(0).normal(size=decay.shape)
    assert second_order(tuple(free_decay(noisy))) == pytest.approx((damping, frequency), abs=0.01)


def test_modified_yule_walker_is_not_biased_by_noise_as_plain_equations_are():
    values = process(0.1, 0.5, n=100_000, snr=3.0)[:, 0]
    zeta, omega = second_order(modified_yule_walker(values, last_lag=12))
    assert (zeta, omega) == pytest.approx((0.1, 0.5), abs=0.01)
    c = [values[h:] @ values[: len(values) - h] for h in range(3)]
    phi = np.linalg.solve([[c[0], c[1]], [c[1], c[0]]], c[1:])
    assert not second_order(tuple(np.roots([1.0, *-phi])))[0] < 0.2


def test_it_draws_itself(tmp_path):
    axes = oscillator(process(0.1, 0.5)).plot()
    axes.figure.savefig(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("values", "arguments", "said"),
    [
        (np.zeros(31), {}, "n at least 32"),
        (np.zeros((50, 0)), {}, "n at least 32"),
        (np.ones(50), {}, "does not change"),
        (np.full(50, math.nan), {}, "not finite"),
        (["a"] * 50, {}, "must be numbers"),
        (np.arange(50.0), {"confidence": 1.0}, "confidence = 1.0"),
        (np.arange(50.0), {"rank": 2.0}, "rank = 2.0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(values, arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        oscillator(values, **arguments)


def test_other_bad_input_is_refused_as_well():
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        Pair.of(1.0, 0.5)
    with pytest.raises(ConfigurationError, match="less than pi"):
        Pair.of(0.1, 4.0)
    with pytest.raises(ConfigurationError, match="must be positive"):
        cramer_rao(0.1, 0.5, n=0, snr=1.0)
    with pytest.raises(ConfigurationError, match="at least 9"):
        free_decay(np.ones(5))
    with pytest.raises(ConfigurationError, match="not all zero"):
        free_decay(np.zeros(50))
    with pytest.raises(ConfigurationError, match="from 4 to 49"):
        modified_yule_walker(np.ones(50), last_lag=3)
