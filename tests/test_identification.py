"""Noise variances by maximum likelihood.

Oracles: the published fit of the Nile series (Durbin and Koopman: 15,099, 1,469, log-likelihood -632.54), statsmodels'
own structural model with its standard errors, and the package's own smoother, whose likelihood must be the same number.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy.stats import binom

from kalmanguard.analysis.augmented import Noise
from kalmanguard.analysis.consistency import consistency
from kalmanguard.analysis.identification import identify
from kalmanguard.analysis.smoothing import smooth
from kalmanguard.errors import ConfigurationError


@pytest.fixture(scope="module")
def nile():
    from statsmodels.datasets import nile

    return nile.load_pandas().data["volume"].to_numpy()


def walk(noise, steps, seed):
    rng = np.random.default_rng(seed)
    n = steps[-1] + 1
    slope = np.cumsum(rng.normal(size=n)) * math.sqrt(noise.slope or 0.0)
    level = np.cumsum(slope + rng.normal(size=n) * math.sqrt(noise.level))
    return (level + rng.normal(size=n) * math.sqrt(noise.measurement))[steps]


def test_the_nile_is_what_the_book_says(nile):
    found = identify(np.arange(100), nile)
    assert found.measurement.estimate == pytest.approx(15_099, abs=5)
    assert found.level.estimate == pytest.approx(1_469, abs=2)
    assert found.log_likelihood == pytest.approx(-632.54, abs=0.01)
    assert found.converged
    assert found.slope is None
    smoothed = smooth(np.arange(100), nile, found.noise)
    assert smoothed.log_likelihood == pytest.approx(found.log_likelihood, abs=1e-6)
    judged = consistency(smoothed.innovations, smoothed.innovation_variances)
    assert judged.nis.statistic == pytest.approx(1.0, abs=5e-3)
    assert judged.verdict == "consistent"


@pytest.mark.parametrize("trend", [False, True])
def test_estimates_and_errors_are_those_of_statsmodels(trend):
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    values = walk(Noise(1.0, 0.3, 0.02 if trend else None), np.arange(300), 3)
    found = identify(np.arange(300), values, trend=trend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = UnobservedComponents(values, level="local linear trend" if trend else "local level")
        other = model.fit(disp=0, method="lbfgs", pgtol=1e-9, factr=10.0, maxiter=500, cov_type="approx")
    assert found.log_likelihood >= other.llf - 1e-3
    for mine, value, error in zip((found.measurement, found.level, found.slope), other.params, other.bse, strict=False):
        assert mine.estimate == pytest.approx(value, rel=0.02)
        assert math.log(mine.high / mine.estimate) / 1.96 == pytest.approx(error / value, rel=0.05)


def test_irregular_steps_are_steps_that_were_not_seen():
    rng = np.random.default_rng(4)
    steps = np.sort(rng.choice(600, 250, replace=False))
    noise = Noise(1.0, 0.1)
    values = walk(noise, steps, 5)
    sparse, full = np.full(600, np.nan), identify(steps, values)
    sparse[steps] = values
    again = identify(np.arange(600), sparse)
    assert again.level == full.level
    assert smooth(steps, values, full.noise).log_likelihood == pytest.approx(full.log_likelihood, abs=1e-6)
    assert smooth(np.arange(600), sparse, full.noise).log_likelihood == pytest.approx(full.log_likelihood, abs=1e-6)
    bent = identify(steps, values, trend=True)
    assert smooth(steps, values, bent.noise).log_likelihood == pytest.approx(bent.log_likelihood, abs=0.02)


def test_intervals_cover_at_about_their_rate():
    covered = np.zeros(2, dtype=int)
    for seed in range(16):
        found = identify(np.arange(200), walk(Noise(1.0, 0.3), np.arange(200), 100 + seed), confidence=0.9)
        covered += (found.measurement.low <= 1.0 <= found.measurement.high, found.level.low <= 0.3 <= found.level.high)
    low, high = binom.ppf([1e-3, 1.0 - 1e-3], 16, 0.9)
    assert ((low <= covered) & (covered <= high)).all()


def test_what_cannot_be_told_from_zero_is_zero_and_has_no_upper_bound():
    values = np.diff(np.random.default_rng(0).normal(size=301))  # neighbours anticorrelated: nothing moves
    still, moving = identify(np.arange(300), values), identify(np.arange(300), np.cumsum(np.abs(values)))
    assert still.level.estimate == still.level.low == 0.0
    assert math.isnan(still.level.high)
    assert still.measurement.estimate == pytest.approx(values.var(), rel=0.02)
    assert moving.measurement.estimate == 0.0
    assert moving.level.estimate == pytest.approx(np.mean(values[1:] ** 2), rel=0.02)
    assert smooth(np.arange(300), np.cumsum(values), moving.noise).log_likelihood == pytest.approx(
        moving.log_likelihood, abs=0.01
    )


def test_units_do_not_matter():
    values = walk(Noise(1.0, 0.3), np.arange(150), 6)
    one, small = identify(np.arange(150), values), identify(np.arange(150) * 1, 1e-6 * values + 1.0)
    assert small.level.estimate == pytest.approx(1e-12 * one.level.estimate, rel=1e-3)
    assert small.log_likelihood == pytest.approx(one.log_likelihood + 149 * math.log(1e6), abs=1e-3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.ones(50), "do not change"),
        (np.arange(9.0), "holds 9 values"),
        (np.full(50, np.nan), "holds 0 values"),
        (np.r_[np.arange(49.0), np.inf], "is infinite"),
    ],
)
def test_degenerate_series_are_refused_in_a_sentence(values, said):
    with pytest.raises(ConfigurationError, match=said):
        identify(np.arange(len(values)), values)
    with pytest.raises(ConfigurationError, match="confidence = 95"):
        identify(np.arange(20), np.arange(20.0) ** 2, confidence=95)
