"""Consistency checks: filters that match pass at their rate, mismatched ones are rejected.

Oracles: exact binomial bounds of the rates, scipy's chi-square, the definition of the NEES.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, chi2

from kalmanguard.analysis.augmented import Noise
from kalmanguard.analysis.checks import Verdict
from kalmanguard.analysis.consistency import consistency
from kalmanguard.analysis.nees import nees
from kalmanguard.analysis.smoothing import smooth
from kalmanguard.errors import ConfigurationError

TRUE = Noise(1.0, 0.1)


def level_and_values(seed, n=200):
    rng = np.random.default_rng(seed)
    level = np.cumsum(math.sqrt(TRUE.level) * rng.normal(size=n))
    return level, level + rng.normal(size=n)


def judge(noise, seed, *, bias=0.0, confidence=0.95):
    smoothed = smooth(np.arange(200), level_and_values(seed)[1], noise)
    deviations = np.sqrt(smoothed.innovation_variances)
    return consistency(smoothed.innovations + bias * deviations, smoothed.innovation_variances, confidence=confidence)


def test_filters_that_match_pass_at_their_rate():
    passed = {"all": 0, "nis": 0, "mean": 0, "whiteness": 0}
    for seed in range(100):
        result = judge(TRUE, seed, confidence=0.9)
        passed["all"] += result.verdict is Verdict.CONSISTENT
        for name in ("nis", "mean", "whiteness"):
            passed[name] += getattr(result, name).verdict is Verdict.CONSISTENT
    assert passed["all"] >= binom.ppf(1e-3, 100, 0.9)
    assert passed["all"] <= binom.ppf(0.999, 100, 0.95)  # and the checks are not idle
    for name in ("nis", "mean", "whiteness"):
        low, high = binom.ppf([1e-3, 1 - 1e-3], 100, 1 - 0.1 / 3)
        assert low <= passed[name] <= high


@pytest.mark.parametrize(
    ("noise", "bias", "verdict"),
    [
        (Noise(0.25, 0.025), 0.0, "overconfident"),
        (Noise(4.0, 0.4), 0.0, "underconfident"),
        (Noise(1.0, 0.001), 0.0, "overconfident"),
        (Noise(1.0, 3.0), 0.0, "underconfident"),
        (Noise(0.1, 0.1), 0.0, "overconfident"),
        (TRUE, 0.4, "biased"),
    ],
)
def test_wrong_noise_and_bias_are_rejected(noise, bias, verdict):
    verdicts = [judge(noise, seed, bias=bias).verdict for seed in range(20)]
    assert sum(v is not Verdict.CONSISTENT for v in verdicts) >= 18
    assert max(set(verdicts), key=verdicts.count) == verdict


@pytest.mark.parametrize(("noise", "sign"), [(Noise(1.0, 0.001), 1.0), (Noise(1.0, 3.0), -1.0)])
def test_memory_shows_a_wrong_gain_even_at_the_right_size_and_its_sign_says_which_way(noise, sign):
    first, verdicts = [], []
    for seed in range(10):
        smoothed = smooth(np.arange(400), level_and_values(seed, n=400)[1], noise)
        variances = smoothed.innovation_variances
        fitted = variances * np.nanmean(smoothed.innovations**2 / variances)
        result = consistency(smoothed.innovations, fitted)
        assert result.nis.statistic == pytest.approx(1.0)
        first.append(sign * result.autocorrelations[0])
        verdicts.append(result.whiteness.verdict)
    assert np.median(first) > 0.2
    assert verdicts.count(Verdict.CORRELATED) >= 9


def test_the_interval_is_chi_square_and_columns_count_as_much_as_they_are_worth():
    z = np.random.default_rng(1).normal(size=(100, 3))
    plain = consistency(z, np.ones(100))
    assert (plain.nis.low, plain.nis.high) == pytest.approx(tuple(chi2.ppf([0.05 / 6, 1 - 0.05 / 6], 300) / 300))
    assert plain.nis.statistic == pytest.approx((z**2).mean())
    assert plain.nis.guarantee == "EXACT"
    # Three copies of one column: with their rank of one they are judged as that column is.
    copies, one = consistency(z[:, [0, 0, 0]], np.ones((100, 3)), rank=1.0), consistency(z[:, 0], np.ones(100))
    for name in ("nis", "mean", "whiteness"):
        mine, other = getattr(copies, name), getattr(one, name)
        assert (mine.statistic, mine.low, mine.high, mine.p_value) == pytest.approx(
            (other.statistic, other.low, other.high, other.p_value)
        )
    assert copies.nis.guarantee == "ASYMPTOTIC"


def test_rows_without_a_measurement_are_left_out_and_it_draws_itself(tmp_path):
    z = np.random.default_rng(2).normal(size=100)
    holes = np.insert(z, 50, np.nan)
    result = consistency(holes, np.ones(101))
    assert result.nis == consistency(z, np.ones(100)).nis
    result.plot().figure.savefig(tmp_path / "lags.png")
    assert (tmp_path / "lags.png").stat().st_size > 1000


def test_nees_passes_at_its_rate_and_rejects_what_is_wrong():
    rng = np.random.default_rng(3)
    root = rng.normal(size=(3, 3))
    p = np.tile(root @ root.T + np.eye(3), (50, 1, 1))
    errors = rng.normal(size=(200, 50, 3)) @ np.linalg.cholesky(p[0]).T
    verdicts = [nees(e, p).verdict for e in errors]
    low, high = binom.ppf([1e-3, 1 - 1e-3], 200, 0.95)
    assert low <= sum(v is Verdict.CONSISTENT for v in verdicts) <= high
    assert nees(errors[0], p).statistic == pytest.approx(np.mean([e @ np.linalg.solve(p[0], e) for e in errors[0]]) / 3)
    assert sum(nees(e, p / 2).verdict is Verdict.OVERCONFIDENT for e in errors) >= 199
    assert sum(nees(e, 2 * p).verdict is Verdict.UNDERCONFIDENT for e in errors) >= 199


def test_the_smoothers_own_errors_pass_and_those_of_a_wrong_model_do_not():
    def errors(noise):
        series = [level_and_values(seed, n=41) for seed in range(100)]
        results = [(level, smooth(np.arange(41), values, noise)) for level, values in series]
        e = np.array([[s.level[20] - level[20]] for level, s in results])
        return nees(e, np.array([[[s.level_sd[20] ** 2]] for _, s in results]))

    assert errors(TRUE).verdict is Verdict.CONSISTENT
    assert errors(Noise(0.25, 0.025)).verdict is Verdict.OVERCONFIDENT


@pytest.mark.parametrize(
    ("innovations", "variances", "arguments", "said"),
    [
        (np.ones(50), np.ones(49), {}, "as many rows"),
        (np.ones(20), np.ones(20), {}, "too few for 10 lags"),
        (np.ones(50), np.zeros(50), {}, "positive"),
        (np.full(50, np.inf), np.ones(50), {}, "must be finite"),
        (["a"] * 50, np.ones(50), {}, "must be numbers"),
        (np.ones(50), np.ones(50), {"confidence": 0.0}, "confidence = 0.0"),
        (np.ones(50), np.ones(50), {"rank": 0.5}, "rank = 0.5"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(innovations, variances, arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        consistency(innovations, variances, **arguments)


@pytest.mark.parametrize(
    ("errors", "covariances", "said"),
    [
        (np.ones(5), np.ones((5, 1, 1)), r"must be \(n, d\)"),
        (np.ones((5, 1)), -np.ones((5, 1, 1)), "not positive definite"),
        (np.full((5, 1), np.nan), np.ones((5, 1, 1)), "must be finite"),
        ([["a"]], np.ones((1, 1, 1)), "must be numbers"),
    ],
)
def test_bad_errors_are_refused_in_a_sentence(errors, covariances, said):
    with pytest.raises(ConfigurationError, match=said):
        nees(errors, covariances)
