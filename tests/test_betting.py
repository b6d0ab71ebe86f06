"""The betting test and the transcript bound, held against their theorems.

Oracles: Ville's inequality with an exact binomial interval (Type-I error at the boundary of the null), repeated scalar
updates (vectorised path, 1e-12: the logarithms differ in the last bit), exact integer arithmetic (transcripts, 1e-12),
the figures in the derivation of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from kalmanguard.certificate import verify
from kalmanguard.certificate.betting import LAMBDA_RULE, STAKE, BettingTest, alpha_t
from kalmanguard.certificate.transcript import log_transcripts, transcript_bound
from kalmanguard.errors import ConfigurationError

DELTA, CLIP, ALPHA = 0.05, 4.0, 0.05
RUNS, EXAMPLES = 2000, 600

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def make(**changes: float) -> BettingTest:
    return BettingTest(**{"delta": DELTA, "clip": CLIP, "alpha": ALPHA, **changes})


# Every one has mean exactly DELTA within the clip: the least favourable member of the null.
BOUNDARY: dict[str, Draw] = {
    "gaussian": lambda rng, size: np.clip(rng.normal(0, 0.3, size), -CLIP, CLIP) + DELTA,
    "constant": lambda rng, size: np.full(size, DELTA),
    "rare loss": lambda rng, size: np.where(rng.random(size) < DELTA / CLIP, CLIP, 0.0),
    "rarer loss": lambda rng, size: np.where(rng.random(size) < 0.06 / 4.01, CLIP, -0.01),
    "two extremes": lambda rng, size: np.where(rng.random(size) < (DELTA + CLIP) / (2 * CLIP), CLIP, -CLIP),
    "heavy": lambda rng, size: (
        rng.choice([-1.0, 1.0], size) * np.minimum(0.02 / rng.random(size), CLIP - DELTA) + DELTA
    ),
}


@pytest.mark.parametrize("name", BOUNDARY)
def test_false_certificates_stay_below_alpha_at_the_boundary(name: str) -> None:
    rng = np.random.default_rng(1)
    draws = BOUNDARY[name](rng, (RUNS, EXAMPLES))
    assert np.abs(draws).max() <= CLIP
    false = 0
    for differences in draws:
        test = make(alpha=ALPHA)
        test.update_all(differences)
        false += test.rejects
    assert false <= binom.ppf(0.9999, RUNS, ALPHA)


def test_an_adversary_who_sees_the_bets_does_not_beat_the_test() -> None:
    """Adaptive differences: quiet while the wealth is low, a gamble just below the threshold, mean DELTA throughout."""
    rng = np.random.default_rng(2)
    false = 0
    for _ in range(400):
        test = make()
        for _ in range(EXAMPLES):
            if test.log_wealth > 0.5 * math.log(1 / ALPHA):
                p = (DELTA + CLIP) / (2 * CLIP)
                test.update(CLIP if rng.random() < p else -CLIP)
            else:
                test.update(CLIP if rng.random() < DELTA / CLIP else 0.0)
            if test.rejects:
                break
        false += test.rejects
    assert false <= binom.ppf(0.9999, 400, ALPHA)


def test_the_size_test_can_fail() -> None:
    """Just inside the alternative the rate of certificates is far above alpha: the checks above have teeth."""
    rng = np.random.default_rng(3)
    certified = 0
    for _ in range(200):
        test = make()
        test.update_all(rng.normal(-0.05, 0.1, EXAMPLES))
        certified += test.rejects
    assert certified >= 190


@pytest.mark.parametrize(("spread", "limit"), [(0.1, 340), (0.3, 420), (0.5, 800)])
def test_unchanged_losses_are_certified_within_the_stated_number_of_examples(spread: float, limit: int) -> None:
    rng = np.random.default_rng(4)
    needed = []
    for _ in range(200):
        test = make(alpha=alpha_t(ALPHA, 1))
        path = test.update_all(rng.normal(0.0, spread, 3000))
        hits = np.flatnonzero(path >= -math.log(test.alpha))
        needed.append(hits[0] + 1 if hits.size else 3000)
    assert np.median(needed) <= limit


def test_the_bet_adapts_where_the_largest_one_would_ruin() -> None:
    """With clip 1 and a standard deviation of 0.5 the largest bet loses, the rule's grows."""
    rng = np.random.default_rng(5)
    draws = np.clip(rng.normal(0.0, 0.5, (100, 4000)), -1, 1)
    largest = np.log1p(STAKE / (1 - DELTA) * (DELTA - draws)).sum(axis=1)
    final = np.array([make(clip=1.0).update_all(row)[-1] for row in draws])
    assert np.median(largest) < 0 < 3.0 < np.median(final)


def test_wealth_survives_the_worst_differences_and_stays_positive() -> None:
    test = make(c=0.999)
    path = test.update_all(np.full(200, math.inf))
    assert np.isfinite(path).all()
    assert test.log_wealth < -5
    # The rule learns: after a run of losses it bets nothing.
    assert path[-1] == path[-2]


def test_non_finite_differences_count_as_the_worst() -> None:
    reference = make().update_all([CLIP])[-1]
    for worst in (math.nan, math.inf, 1e300):
        assert make().update(worst) == reference
        assert make().update_all([worst])[-1] == pytest.approx(reference, rel=1e-15)
    assert make().update(-math.inf) == make().update(-CLIP)


@given(st.lists(st.floats(width=64, allow_nan=True, allow_infinity=True), min_size=1, max_size=60), st.integers(0, 60))
def test_vectorised_equals_scalar_in_any_split(differences: list[float], cut: int) -> None:
    whole, parts, single = make(), make(), make()
    path = whole.update_all(differences)
    parts.update_all(differences[:cut])
    parts.update_all(differences[cut:])
    scalar = [single.update(x) for x in differences]
    np.testing.assert_allclose(path, scalar, rtol=1e-12, atol=1e-14)
    assert parts.log_wealth == pytest.approx(whole.log_wealth, rel=1e-12, abs=1e-14)
    assert whole.count == parts.count == single.count == len(differences)
    assert whole.rejects == single.rejects


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=80), st.floats(0.01, 0.9), st.floats(0.1, 0.99))
def test_the_verifiers_own_implementation_agrees(differences: list[float], delta: float, c: float) -> None:
    path = BettingTest(delta=delta, clip=1.5, alpha=0.1, c=c).update_all(differences)
    weight = int(LAMBDA_RULE.removeprefix("kelly-"))
    theirs = verify.log_wealth_path(np.array(differences), delta=delta, clip=1.5, c=c, weight=weight)
    np.testing.assert_allclose(path, theirs, rtol=1e-11, atol=1e-13)


def test_a_rejection_is_kept() -> None:
    test = make()
    test.update_all(np.zeros(1000))
    assert test.rejects
    test.update_all(np.full(100, CLIP))
    assert test.log_wealth < 0
    assert test.rejects


def test_spending_sums_to_alpha() -> None:
    total = math.fsum(alpha_t(ALPHA, t) for t in range(1, 200_001))
    assert ALPHA * (1 - 1e-5) < total < ALPHA
    with pytest.raises(ConfigurationError, match="counted from 1"):
        alpha_t(ALPHA, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": 0.0}, "delta = 0.0"),
        ({"delta": 4.0}, "clip = 4.0"),
        ({"clip": math.inf}, "both finite"),
        ({"delta": math.nan}, "delta = nan"),
        ({"alpha": 1.0}, "alpha = 1.0"),
        ({"c": 1.0}, "c = 1.0"),
        ({"c": 0.0}, "c = 0.0"),
    ],
)
def test_a_test_that_cannot_work_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(**changes)


# --- transcripts ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 70), st.integers(1, 40))
def test_transcripts_are_counted_exactly(steps: int, interventions: int, kinds: int) -> None:
    exact = sum(math.comb(steps, j) * kinds**j for j in range(min(interventions, steps) + 1))
    assert log_transcripts(steps, interventions, kinds) == pytest.approx(math.log(exact), rel=1e-12, abs=1e-12)


def test_the_bound_has_the_figures_of_its_derivation() -> None:
    few = transcript_bound(examples=16, steps=250, interventions=10, kinds=1, loss_range=2.5, delta=0.05)
    many = transcript_bound(examples=10_000, steps=10_000, interventions=20, kinds=1, loss_range=2.5, delta=0.05)
    assert few / 2.5 == pytest.approx(1.24, abs=0.005)
    assert many / 2.5 == pytest.approx(0.088, abs=0.0005)


def test_the_bound_of_a_very_long_run_is_computed() -> None:
    value = transcript_bound(examples=1024, steps=10**7, interventions=1000, kinds=64, loss_range=8.0, delta=0.05)
    # Stirling: ln C(T, k) is k ln(T e / k) - ln sqrt(2 pi k) up to k^2/T.
    nats = 1000 * (math.log(10**7 * math.e / 1000) + math.log(64)) - 0.5 * math.log(2 * math.pi * 1000)
    nats += math.log(2 * (10**7 + 1) / 0.05)
    assert value == pytest.approx(8.0 * math.sqrt(nats / 2048), rel=1e-4)


@given(st.integers(1, 400), st.integers(0, 50), st.integers(1, 64))
def test_the_verifiers_own_bound_agrees(steps: int, interventions: int, kinds: int) -> None:
    ours = transcript_bound(
        examples=100, steps=steps, interventions=interventions, kinds=kinds, loss_range=8.0, delta=0.05
    )
    assert verify.transcript_bound(100, steps, interventions, kinds, 8.0, 0.05) == pytest.approx(ours, rel=1e-12)


def test_the_bound_covers_the_worst_of_all_steps() -> None:
    """The largest deviation in a run is inside the bound, and mostly outside the interval for a single look."""
    rng = np.random.default_rng(6)
    n, steps, k = 50, 200, 8
    bound = transcript_bound(examples=n, steps=steps, interventions=k, kinds=1, loss_range=1.0, delta=0.05)
    single = math.sqrt(math.log(2 / 0.05) / (2 * n))
    worst = []
    for _ in range(200):
        # Losses of each step's candidate on the probe: fair coins, population mean 1/2.
        means = rng.integers(0, 2, (steps, n)).mean(axis=1)
        worst.append(np.abs(means - 0.5).max())
    assert max(worst) <= bound
    assert np.mean(np.array(worst) > single) > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": 0}, "examples = 0"),
        ({"steps": 0}, "steps = 0"),
        ({"interventions": -1}, "interventions = -1"),
        ({"kinds": 0}, "kinds = 0"),
        ({"loss_range": 0.0}, "loss_range = 0.0"),
        ({"delta": 0.0}, "delta = 0.0"),
    ],
)
def test_a_bound_that_cannot_be_is_refused(changes: dict[str, float], message: str) -> None:
    good = {"examples": 10, "steps": 10, "interventions": 1, "kinds": 1, "loss_range": 1.0, "delta": 0.1}
    with pytest.raises(ConfigurationError, match=message):
        transcript_bound(**{**good, **changes})
