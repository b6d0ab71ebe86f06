"""Conformal thresholds of scores that come run by run: exact where runs are many enough, else by pooled steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray

#: Rounding of a level such as 0.999, which is no binary fraction, must not cost a rank.
_ROUNDING = 1e-9
#: Largest scores that show how scores beyond a high threshold cluster in runs.
_SEEN = 20


def smallest_rank(level: float, n: int) -> int:
    """Rank ``ceil((n + 1) level)`` of the conformal quantile among n scores; above n there is none.

    >>> smallest_rank(0.9, 9), smallest_rank(0.99, 99), smallest_rank(0.99, 98)
    (9, 99, 99)
    """
    return math.ceil((n + 1) * level - _ROUNDING)


def highest_level(n: int) -> float:
    """The highest level that n exchangeable scores support: ``n / (n + 1)``."""
    return n / (n + 1)


def split_threshold(scores: FloatArray, level: float) -> float:
    """Split-conformal threshold of exchangeable scores: ``P(next score <= threshold) >= level``.

    MAPIE's split-conformal regressor of a model that always predicts zero, on the scores' ranks: its absolute residual
    knows no sign, ranks do, and the threshold is one of the scores to the last bit.

    Parameters
    ----------
    scores
        Exchangeable with the score to come, shape ``(n,)``.
    level
        Coverage, in (0, 1).

    Raises
    ------
    ConfigurationError
        The level is outside (0, 1), a score is nan, or n scores do not support the level.

    Notes
    -----
    Guarantee: EXACT for exchangeable scores, marginally over calibration and the next score; at most
    ``level + 1 / (n + 1)`` without ties. Steps of one run are not exchangeable: choose one a run (`one_per_run`), or
    expect what `pooled_threshold` says. Cost: a sort; MAPIE takes long to import, once.

    References
    ----------
    Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005, chapter 4.

    Examples
    --------
    >>> split_threshold(np.arange(1.0, 100.0), 0.9)
    90.0
    >>> split_threshold(np.arange(9.0), 0.99)
    Traceback (most recent call last):
    kalmanguard.errors.ConfigurationError: 9 scores support levels up to 0.9, not 0.99: 99 are needed.
    """
    known = np.sort(np.asarray(scores, dtype=np.float64).ravel())
    _check_level(level)
    if known.size and np.isnan(known[-1]):
        raise ConfigurationError("A score is nan: leave out the steps at which a channel saw nothing.")
    n = len(known)
    rank = smallest_rank(level, n)
    if rank > n:
        raise ConfigurationError(
            f"{n} scores support levels up to {highest_level(n):.4g}, not {level:g}: {_needed(level)} are needed."
        )
    if rank == n:  # MAPIE asks for one score more than are needed
        return float(known[-1])
    from mapie.regression import SplitConformalRegressor
    from sklearn.base import BaseEstimator, RegressorMixin

    class Zero(RegressorMixin, BaseEstimator):  # type: ignore[misc]
        def fit(self, X: FloatArray, y: FloatArray | None = None) -> Zero:  # noqa: N803 - scikit-learn's own names
            self.is_fitted = True  # where MAPIE looks
            return self

        def predict(self, X: FloatArray) -> FloatArray:  # noqa: N803
            return np.zeros(len(X))

    nothing = np.zeros((n, 1))
    regressor = SplitConformalRegressor(Zero().fit(nothing), confidence_level=level, prefit=True)
    regressor.conformalize(nothing, np.arange(1.0, n + 1.0))
    rank = round(float(regressor.predict_interval(nothing[:1])[1][0, 1, 0]))
    return float(known[rank - 1])


def hierarchical_threshold(runs: Sequence[FloatArray], level: float) -> float:
    """Threshold from all steps of exchangeable runs: ``P(score of a random step of a new run <= threshold) >= level``.

    The smallest h with ``sum_j (share of run j's scores <= h) >= (K + 1) level``: all scores of a run weigh as much as
    one run, and the run to come counts as infinite.

    Parameters
    ----------
    runs
        Scores of K runs, each of shape ``(n_j,)`` with ``n_j >= 1``.
    level
        Coverage, in (0, 1).

    Raises
    ------
    ConfigurationError
        The level is outside (0, 1), a run is empty or holds a nan, or K runs do not support the level.

    Notes
    -----
    Guarantee: EXACT if the runs, the new one included, are exchangeable; how steps depend on one another within a run,
    and how the innovations' spread moves over it, does not matter. It is marginal: over the corpus, the new run and a
    step of it drawn at random. It says nothing of a given run, of a given step, or of runs from elsewhere. One score a
    run with `split_threshold` has the same guarantee, but uses so much less that thresholds vary more (measured by
    ``python -m benchmarks calibration``). Cost: a sort of all scores.

    References
    ----------
    Lee, Barber, Willett, "Distribution-free inference with hierarchical data", arXiv 2306.06342 (hierarchical conformal
    prediction); Dunn, Wasserman, Ramdas, "Distribution-free prediction sets for two-layer hierarchical models",
    JASA 2022, for pooling and subsampling.

    Examples
    --------
    >>> hierarchical_threshold([np.array([1.0, 2.0]), np.array([3.0]), np.array([4.0] * 5)], 0.7)
    4.0
    """
    _check_level(level)
    _check_runs(runs)
    k = len(runs)
    if smallest_rank(level, k) > k:
        raise ConfigurationError(
            f"{k} runs support levels up to {highest_level(k):.4g}, not {level:g}: {_needed(level)} are needed, "
            "however many steps each has."
        )
    return _weighted_quantile(runs, (k + 1) * level)


def pooled_threshold(runs: Sequence[FloatArray], level: float) -> tuple[float, float]:
    """Split-conformal threshold of equally many, evenly spaced steps of each run, and the effective number of these.

    Parameters
    ----------
    runs
        Scores of K >= 2 runs.
    level
        Coverage, in (0, 1).

    Returns
    -------
    threshold, effective_size
        The effective size is the number of steps over the design effect (`design_effect`) of reaching the threshold, or
        the 20th largest score where that is larger.

    Raises
    ------
    ConfigurationError
        As in `hierarchical_threshold`, or the effective size does not support the level.

    Notes
    -----
    Guarantee: ASYMPTOTIC in the number of runs (pooling of empirical distributions). For levels that K runs do not
    support exactly it is the best that a corpus can say: a kind of run that is met once in 2 K runs may exceed the
    threshold at every step, and no corpus of K runs can exclude it.
    """
    _check_level(level)
    _check_runs(runs)
    if len(runs) < 2:
        raise ConfigurationError("At least two runs are needed: one run says nothing about another.")
    steps = min(map(len, runs))
    chosen = [evenly_spaced(scores, steps) for scores in runs]
    threshold = split_threshold(np.concatenate(chosen), level)
    # So few scores reach a high threshold that how they cluster is seen further down.
    tail = np.partition(np.concatenate(chosen), -min(_SEEN, len(chosen) * steps))[-min(_SEEN, len(chosen) * steps)]
    effect = max(design_effect([scores >= at for scores in chosen]) for at in (threshold, min(tail, threshold)))
    size = len(runs) * steps / effect
    if smallest_rank(level, math.floor(size)) > size:
        raise ConfigurationError(
            f"{len(runs) * steps:,} steps of {len(runs)} runs depend on one another so much that they are worth "
            f"{size:,.0f}: they support levels up to {highest_level(math.floor(size)):.5g}, not {level:g}."
        )
    return threshold, size


def one_per_run(runs: Sequence[FloatArray], *, seed: int) -> FloatArray:
    """One score of each run, drawn at random: exchangeable if the runs are; shape ``(K,)``."""
    _check_runs(runs)
    rng = np.random.default_rng(seed)
    return np.array([scores[rng.integers(len(scores))] for scores in runs], dtype=np.float64)


def evenly_spaced(scores: FloatArray, count: int) -> FloatArray:
    """``count`` scores in equal distances over a run, each in the middle of its stretch."""
    return np.asarray(scores)[((np.arange(count) + 0.5) * len(scores) / count).astype(np.int64)]


def design_effect(exceeded: Sequence[np.ndarray]) -> float:
    """Variance of the pooled rate of exceedances, between runs, over that of as many independent steps; at least 1.

    It counts what steps of one run have in common, dependence in time and differences between runs alike (Kish, "Survey
    Sampling", 1965, section 5.4). 1 where nothing or everything is exceeded: such a corpus does not show it.
    """
    shares = np.array([np.mean(one) for one in exceeded], dtype=np.float64)
    steps = float(np.mean([len(one) for one in exceeded]))
    rate = float(shares.mean())
    if len(shares) < 2 or not 0.0 < rate < 1.0:
        return 1.0
    return max(1.0, float(shares.var(ddof=1)) * steps / (rate * (1.0 - rate)))


def _weighted_quantile(runs: Sequence[FloatArray], wanted: float) -> float:
    scores = np.concatenate(runs)
    weights = np.concatenate([np.full(len(one), 1.0 / len(one)) for one in runs])
    order = np.argsort(scores, kind="stable")
    below = np.cumsum(weights[order])
    at = int(np.searchsorted(below, wanted - _ROUNDING * len(runs)))
    return float(scores[order[min(at, len(order) - 1)]])


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ConfigurationError(f"level = {level} is outside (0, 1).")


def _check_runs(runs: Sequence[FloatArray]) -> None:
    if not runs or any(len(scores) == 0 or bool(np.isnan(scores).any()) for scores in runs):
        raise ConfigurationError("Scores of at least one run are needed, and none of them empty or with a nan.")


def _needed(level: float) -> int:
    return math.ceil(level / (1.0 - level) - 1e-6)
