"""Regimes of a whole series.

Oracles: enumeration of all paths of a small hidden Markov chain (the smoother is exact for the chain alone), the
running filter (the last row), and series whose regimes are known.
"""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from kalmanguard.analysis.regimes import kim_smoother, regimes
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.regimes import REGIMES, RegimeFilter


def test_the_smoother_is_the_sum_over_all_paths():
    rng = np.random.default_rng(0)
    transitions = rng.dirichlet([2.0, 1.0, 1.0], size=3)
    likelihoods, prior = rng.uniform(0.01, 1.0, size=(6, 3)), np.array([0.6, 0.3, 0.1])
    filtered, ahead = [], prior
    for row in likelihoods:
        filtered.append(ahead * row / (ahead @ row))
        ahead = filtered[-1] @ transitions
    weights = np.zeros((6, 3))
    for path in product(range(3), repeat=6):
        p = prior[path[0]] * np.prod([transitions[i, j] for i, j in pairwise(path)])
        p *= np.prod([likelihoods[t, i] for t, i in enumerate(path)])
        for t, i in enumerate(path):
            weights[t, i] += p
    np.testing.assert_allclose(
        kim_smoother(np.array(filtered), transitions), weights / weights.sum(1, keepdims=True), rtol=1e-10
    )


def test_the_last_step_is_the_running_filter_and_rows_are_probabilities():
    z = np.random.default_rng(1).normal(size=60)
    found, state = regimes(np.arange(60), z), RegimeFilter.init()
    for value in z:
        state = RegimeFilter().step(state, float(value))
    np.testing.assert_allclose(found.probabilities[-1], state.probabilities)
    np.testing.assert_allclose(found.probabilities.sum(1), 1.0)


def test_stretches_are_where_they_were_put_and_partition_the_series():
    rng = np.random.default_rng(2)
    z = rng.normal(size=200)
    z[60:100] = 4.0 * (-1.0) ** np.arange(40) + 0.3 * rng.normal(size=40)
    z[150:170] = 3.0 + 0.4 * np.arange(20)
    steps = 10 * np.arange(200) + 7
    found = regimes(steps, z)
    stretches = found.stretches
    named = {regime: [(s.start, s.end) for s in stretches if s.regime == regime] for regime in REGIMES}
    (start, end), *_ = named["oscillating"]
    assert abs(start - steps[60]) <= 30
    assert abs(end - steps[99]) <= 30
    (start, end), *_ = named["diverging"]
    assert abs(start - steps[150]) <= 50
    assert abs(end - steps[169]) <= 50
    assert stretches[0].start == steps[0]
    assert stretches[-1].end == steps[-1]
    for one, other in pairwise(stretches):
        assert other.start == one.end + 10
        assert one.regime != other.regime
    assert all(0.25 <= s.probability <= 1.0 for s in stretches)
    assert str(found).count("\n") == len(stretches) - 1


def test_looking_back_finds_an_onset_sooner_than_the_filter_did():
    z = np.random.default_rng(3).normal(size=100)
    z[50:] += 2.5 + 0.1 * np.arange(50)
    smoothed = next(s.start for s in regimes(np.arange(100), z).stretches if s.regime == "diverging")
    state, first = RegimeFilter.init(), 0
    for t, value in enumerate(z):
        state = RegimeFilter().step(state, float(value))
        if REGIMES[int(state.probabilities.argmax())] == "diverging":
            first = t
            break
    assert abs(smoothed - 50) <= 5
    assert smoothed <= first


def test_missing_values_take_no_step_and_it_draws_itself(tmp_path):
    z = np.random.default_rng(4).normal(size=40)
    holes = np.insert(z, [10, 20], np.nan)
    np.testing.assert_array_equal(regimes(np.arange(42), holes).probabilities, regimes(np.arange(40), z).probabilities)
    regimes(np.arange(42), holes).plot().figure.savefig(tmp_path / "regimes.png")
    assert (tmp_path / "regimes.png").stat().st_size > 1000
    with pytest.raises(ConfigurationError, match="holds 0 values"):
        regimes(np.arange(5), np.full(5, np.nan))
