"""Regimes of a whole series: what it was in at each step, given all of it, as stretches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kalmanguard.analysis.drawing import axes_or_new
from kalmanguard.analysis.series import series
from kalmanguard.estimators.regimes import REGIMES, TRANSITIONS, RegimeFilter
from kalmanguard.records import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Stretch(NamedTuple):
    """Steps from ``start`` to ``end``, both included, in one regime, with its mean probability there."""

    start: int
    end: int
    regime: str
    probability: float


@dataclass(frozen=True, slots=True, eq=False)
class Regimes:
    """Smoothed probabilities ``(n, 4)`` of `REGIMES` at the steps that hold a value, ``(n,)``."""

    steps: NDArray[np.int64]
    probabilities: FloatArray

    @property
    def stretches(self) -> list[Stretch]:
        """Runs of steps with the same most probable regime, in order."""
        likely = self.probabilities.argmax(1)
        edges = [0, *(np.flatnonzero(np.diff(likely)) + 1).tolist(), len(likely)]
        return [
            Stretch(
                int(self.steps[a]),
                int(self.steps[b - 1]),
                REGIMES[likely[a]],
                float(self.probabilities[a:b, likely[a]].mean()),
            )
            for a, b in pairwise(edges)
        ]

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the probabilities as stacked areas; returns the axes."""
        axes = axes_or_new(axes)
        axes.stackplot(self.steps, self.probabilities.T, labels=REGIMES)
        axes.set_xlabel("step")
        axes.set_ylabel("probability")
        axes.legend()
        return axes

    def __str__(self) -> str:
        return "\n".join(
            f"steps {s.start:,} to {s.end:,}: {s.regime} (probability {s.probability:.2f})" for s in self.stretches
        )


def regimes(steps: ArrayLike, values: ArrayLike) -> Regimes:
    """Run the regime filter over normalised innovations, and smooth its probabilities backwards.

    ``P(i at t | all) = P(i at t | past) sum_j T_ij P(j at t+1 | all) / P(j at t+1 | past up to t)``

    Parameters
    ----------
    steps
        Whole numbers, strictly increasing, shape ``(n,)``.
    values
        Innovations over their standard deviations, shape ``(n,)``. Where they are nan the filter makes no step, as it
        makes none in a run.

    Raises
    ------
    ConfigurationError
        Steps and values are no series, or hold no value.

    Notes
    -----
    Guarantee: HEURISTIC. The filter's constants are a choice, and Kim's smoother takes what is known about the chain at
    step t as all that step t+1 says about it, which mixing regimes makes an approximation. It is exact for the chain
    alone. Cost: that of the filter, and a pass back.

    References
    ----------
    Kim, Journal of Econometrics 60 (1994); `kalmanguard.estimators.regimes` for the filter.

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=120)
    >>> z[60:90] += 8.0
    >>> print(regimes(np.arange(120), z))
    steps 0 to 59: nominal (probability 0.96)
    steps 60 to 89: snapped (probability 1.00)
    steps 90 to 119: nominal (probability 0.97)
    """
    data = series(steps, values).known()
    filter_, state = RegimeFilter(), RegimeFilter.init()
    filtered = np.empty((len(data.values), len(REGIMES)))
    for row, z in enumerate(data.values.tolist()):
        state = filter_.step(state, z)
        filtered[row] = state.probabilities
    return Regimes(data.steps, kim_smoother(filtered, TRANSITIONS))


def kim_smoother(filtered: FloatArray, transitions: FloatArray) -> FloatArray:
    """Smooth filtered probabilities ``(n, m)`` of a Markov chain with the given transitions ``(m, m)``."""
    smoothed = filtered.copy()
    for row in range(len(filtered) - 2, -1, -1):
        ahead = filtered[row] @ transitions
        smoothed[row] = filtered[row] * (transitions @ (smoothed[row + 1] / np.maximum(ahead, np.finfo(float).tiny)))
        smoothed[row] /= smoothed[row].sum()
    return smoothed
