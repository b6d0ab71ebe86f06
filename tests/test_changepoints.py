"""Change points by PELT.

Oracles: optimal partitioning by brute force over all segmentations of short series, and without pruning for longer
ones; binomial bounds of the stated rate under the null; shifts put in at known steps.
"""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from scipy.stats import binom, norm

from kalmanguard.analysis.changepoints import calibrated_penalty, changepoints, segmentation
from kalmanguard.analysis.segment_cost import SegmentCost
from kalmanguard.errors import ConfigurationError


def total(cost, n, starts, penalty):
    edges = [*starts, n]
    return sum(float(cost(a, b)) for a, b in pairwise(edges)) + penalty * (len(starts) - 1)


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_best_of_all_segmentations(variance, seed):
    rng = np.random.default_rng(seed)
    n, shortest, penalty = 13, 1 + 2 * variance, [0.5, 2.0, 6.0][seed % 3]
    z = rng.normal(size=n) + 3.0 * (np.arange(n) > 7)
    cost = SegmentCost(z, variance=variance)
    best = math.inf
    for count in range(n // shortest):
        for inner in combinations(range(1, n), count):
            starts = [0, *inner]
            if min(np.diff([*starts, n])) >= shortest:
                best = min(best, total(cost, n, starts, penalty))
    assert total(cost, n, segmentation(cost, n, penalty, shortest), penalty) == pytest.approx(best)


def without_pruning(cost, n, penalty, shortest):
    best = np.full(n + 1, np.inf)
    best[0] = -penalty
    for end in range(shortest, n + 1):
        best[end] = min(best[s] + float(cost(s, end)) + penalty for s in range(end - shortest + 1))
    return best[n]


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("penalty", [3.0, 12.0])
def test_pruning_loses_nothing(variance, penalty):
    rng = np.random.default_rng(7)
    z = rng.normal(size=150) * np.repeat([1.0, 2.5, 0.5], 50) + np.repeat(rng.normal(size=6) * 2, 25)
    cost, shortest = SegmentCost(z, variance=variance), 1 + 4 * variance
    starts = segmentation(cost, 150, penalty, shortest)
    assert len(starts) > 2
    assert min(np.diff([*starts, 150])) >= shortest
    assert total(cost, 150, starts, penalty) == pytest.approx(without_pruning(cost, 150, penalty, shortest))


def test_the_cost_is_the_likelihood():
    z = np.random.default_rng(8).normal(2.0, 1.5, size=40)
    known = -2 * norm.logpdf(z, z.mean(), 1.0).sum() - 40 * math.log(2 * math.pi)
    free = -2 * norm.logpdf(z, z.mean(), z.std()).sum() - 40 * math.log(2 * math.pi)
    assert float(SegmentCost(z, variance=False)(0, 40)) == pytest.approx(known)
    assert float(SegmentCost(z, variance=True)(0, 40)) == pytest.approx(free)


def false_alarms(n, runs, *, variance, rate, draw):
    return sum(bool(changepoints(np.arange(n), draw(n), variance=variance, rate=rate).changes) for _ in range(runs))


@pytest.mark.parametrize("variance", [False, True])
def test_a_series_without_a_change_has_one_at_about_the_stated_rate(variance):
    rng = np.random.default_rng(9)
    found = false_alarms(60, 200, variance=variance, rate=0.1, draw=lambda n: rng.normal(size=n))
    low, high = binom.ppf(1e-3, 200, 0.05), binom.ppf(0.999, 200, 0.1)
    assert low <= found <= high


@pytest.mark.slow
@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize(("n", "runs"), [(30, 1000), (300, 600), (1000, 300)])
def test_the_same_at_other_lengths(variance, n, runs):
    rng = np.random.default_rng(10)
    found = false_alarms(n, runs, variance=variance, rate=0.05, draw=lambda n: rng.normal(size=n))
    assert binom.ppf(1e-3, runs, 0.02) <= found <= binom.ppf(0.999, runs, 0.05)


def test_heavy_tails_are_no_change_of_the_mean():
    rng = np.random.default_rng(11)
    scale = math.sqrt(3.0)
    clipped = false_alarms(300, 60, variance=False, rate=0.05, draw=lambda n: rng.standard_t(3, size=n) / scale)
    assert clipped <= binom.ppf(0.999, 60, 0.05)
    wild = [rng.standard_t(3, size=300) / scale for _ in range(60)]
    price = calibrated_penalty(300, 0.05, variance=False)
    raw = sum(len(segmentation(SegmentCost(z, variance=False), 300, price, 1)) > 1 for z in wild)
    assert raw > 20


def test_shifts_are_found_where_they_are_whatever_the_steps():
    rng = np.random.default_rng(12)
    found = []
    for _ in range(30):
        z = rng.normal(size=400)
        z[120:200] += 2.0
        z[300] = 50.0  # an outlier, which is none
        z[[5, 6]] = np.nan
        found.append(changepoints(3 * np.arange(400), z, rate=0.01).changes)
    exact = [changes for changes in found if len(changes) == 2]
    assert len(exact) >= 25
    assert np.median(np.abs(np.array(exact) - [360, 600])) <= 3
    calm = rng.normal(size=400)
    calm[200:] *= 2.0
    [change] = changepoints(np.arange(400), calm, variance=True).changes
    assert abs(change - 200) <= 15


def test_a_long_series_and_a_picture(tmp_path):
    z = np.random.default_rng(13).normal(size=3000)
    z[2000:] += 1.0
    result = changepoints(np.arange(3000), z)
    [change] = result.changes
    assert abs(change - 2000) <= 10
    assert [segment.start for segment in result.segments] == [0, change]
    assert result.segments[1].mean == pytest.approx(1.0, abs=0.1)
    assert str(result).count("\n") == 1
    result.plot().figure.savefig(tmp_path / "segments.png")
    assert (tmp_path / "segments.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("values", "arguments", "said"),
    [
        (np.ones(9), {}, "holds 9 values"),
        (np.ones(20), {"rate": 0.0}, "rate = 0.0"),
        (np.ones(20), {"penalty": -1.0}, "penalty = -1.0"),
        (np.r_[np.ones(19), np.inf], {}, "is infinite"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(values, arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        changepoints(np.arange(len(values)), values, **arguments)
