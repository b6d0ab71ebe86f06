"""Whether scores are exchangeable, as a calibration assumes: a check of the calibration, not a detector."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray


class MartingaleResult(NamedTuple):
    """The highest value of the test martingale, and whether it ever reached ``1 / level``."""

    highest: float
    rejected: bool


def conformal_p_values(scores: FloatArray, calibration: FloatArray, *, seed: int) -> FloatArray:
    """P-values ``(#{c > s} + U (#{c = s} + 1)) / (n + 1)`` of scores among calibration scores, shape ``(n,)``.

    Uniform on (0, 1) for a score that is exchangeable with the calibration scores; those of several scores share the
    calibration scores, hence they are exchangeable but not independent.

    >>> conformal_p_values(np.array([5.0]), np.arange(9.0), seed=0).round(1).tolist()
    [0.4]
    """
    known = np.sort(np.asarray(calibration, dtype=np.float64))
    wanted = np.asarray(scores, dtype=np.float64)
    if known.size == 0 or np.isnan(known[-1]) or np.isnan(wanted).any():
        raise ConfigurationError("Calibration scores are needed, and no nan among them or the scores.")
    greater = known.size - np.searchsorted(known, wanted, side="right")
    equal = known.size - greater - np.searchsorted(known, wanted, side="left")
    uniform = np.random.default_rng(seed).random(wanted.shape)
    return np.asarray((greater + uniform * (equal + 1.0)) / (known.size + 1.0), dtype=np.float64)


def permutation_p_value(sequence: FloatArray, *, permutations: int = 500, seed: int = 0) -> float:
    """P-value of exchangeability against a shift of the mean somewhere in the sequence (MAPIE's permutation test).

    Notes
    -----
    Guarantee: EXACT (a permutation test). Its statistic is the largest scaled difference of means before and after a
    split, so that it sees a shift and is blind to a change of spread alone. Cost: that of two means a
    value and permutation.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> permutation_p_value(rng.random(40), permutations=100) > 0.05
    True
    >>> permutation_p_value(np.sort(rng.random(40)), permutations=100) < 0.05
    True
    """
    values = _checked(sequence)
    from mapie.exchangeability_testing import PValuePermutationTest
    from mapie.regression import SplitConformalRegressor
    from sklearn.base import BaseEstimator, RegressorMixin

    class Zero(RegressorMixin, BaseEstimator):  # type: ignore[misc]
        def fit(self, X: FloatArray, y: FloatArray | None = None) -> Zero:  # noqa: N803 - scikit-learn's own names
            self.is_fitted = True
            return self

        def predict(self, X: FloatArray) -> FloatArray:  # noqa: N803
            return np.zeros(len(X))

    nothing = np.zeros((len(values), 1))
    # The score is an absolute residual: the values are shifted, so that none is negative.
    test = PValuePermutationTest(
        mapie_estimator=SplitConformalRegressor(Zero().fit(nothing), prefit=True),
        task="regression",
        random_state=seed,
        num_permutations=permutations,
        warn=False,
    )
    return float(test.run(nothing, values - values.min()).p_values[-1])


def martingale_test(sequence: FloatArray, *, level: float = 0.05, seed: int = 0) -> MartingaleResult:
    """Bet online against exchangeability of a sequence: MAPIE's simple jumper martingale on its own conformal p-values.

    Notes
    -----
    Guarantee: EXACT, at any time: for an exchangeable sequence the martingale reaches ``1 / level`` with probability at
    most ``level`` (Ville). Driven through `compute_p_value` and `update_simple_jumper_martingale`, since its `update`
    takes a regression problem and checks and warns at every call. Cost: each value is compared with all before it.

    References
    ----------
    Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005, section 7.1.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> martingale_test(rng.random(300)).rejected, martingale_test(np.linspace(0.0, 1.0, 300)).rejected
    (False, True)
    """
    values = _checked(sequence)
    if not 0.0 < level < 1.0:
        raise ConfigurationError(f"level = {level} is outside (0, 1).")
    from mapie.exchangeability_testing import OnlineMartingaleTest

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a rejection, which is the result here
        test = OnlineMartingaleTest(test_level=level, warn=False, random_state=seed)
        highest = 1.0
        for index, value in enumerate(values):
            p = test.compute_p_value(float(value), values[:index])
            highest = max(highest, test.update_simple_jumper_martingale(p))
    return MartingaleResult(highest, highest >= 1.0 / level)


def _checked(sequence: FloatArray | Sequence[float]) -> FloatArray:
    values = np.asarray(sequence, dtype=np.float64).ravel()
    if values.size < 2 or not np.isfinite(values).all():
        raise ConfigurationError("A sequence of at least two finite values is needed.")
    return values
