"""Kalman filter and smoother of a level and slope from an unknown start: one pass forward, one back, exactly diffuse.

The start is ``unknown = (level, slope)`` at the first value, with no prior. Everything is linear in it, so columns are
carried along: the first is what the filter makes of the values when the unknowns are 0, the others what it makes of no
values when one of them is 1. Covariances do not depend on the unknowns and serve all columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kalmanguard.analysis.series import Series
from kalmanguard.estimators.statespace import Covariance, Gaussian, predict, update
from kalmanguard.records import FloatArray


class Noise(NamedTuple):
    """Variances of the measurement, and of the level's and the slope's change in one step.

    Without a slope variance (``None``) the model is a local level; with one of 0 the slope is an unknown constant.
    """

    measurement: float
    level: float
    slope: float | None = None

    @property
    def unknowns(self) -> int:
        """How many numbers describe the state: 1 or 2."""
        return 1 if self.slope is None else 2


class Pass(NamedTuple):
    """What the filter leaves behind, by row, with ``m = 1 + unknowns`` columns.

    Attributes
    ----------
    means, covariances
        Predicted, shapes ``(n, 2, m)`` and ``(n, 2, 2)``.
    innovations, variances
        Shapes ``(n, m)`` and ``(n,)``; nan where there is no value.
    gaps
        Steps since the row before, shape ``(n,)``.
    """

    means: FloatArray
    covariances: FloatArray
    innovations: FloatArray
    variances: FloatArray
    gaps: FloatArray


def step_noise(noise: Noise, gap: float) -> Covariance:
    """Process noise of ``gap`` steps at once, exactly that of as many single steps.

    Examples
    --------
    >>> step_noise(Noise(1.0, 0.5, 2.0), 3)
    Covariance(level=11.5, cross=6.0, slope=6.0)
    """
    slope = noise.slope or 0.0
    return Covariance(
        gap * noise.level + slope * (gap - 1.0) * gap * (2.0 * gap - 1.0) / 6.0,
        slope * gap * (gap - 1.0) / 2.0,
        gap * slope,
    )


def forward(data: Series, noise: Noise) -> Pass:
    """Filter, in one pass."""
    n, m = len(data.steps), 1 + noise.unknowns
    gaps = np.diff(data.steps, prepend=data.steps[0]).astype(np.float64)
    first = int(data.seen.argmax())
    # The unknowns are those at the first value: from a row long before it, level and slope could not be told apart.
    level = np.array([0.0, 1.0, -float(data.steps[first] - data.steps[0])])[:m]
    state = Gaussian(level, np.array([0.0, 0.0, 1.0])[:m], Covariance(0.0, 0.0, 0.0))
    means, innovations = np.empty((n, 2, m)), np.full((n, m), np.nan)
    covariances, variances = np.empty((n, 2, 2)), np.full(n, np.nan)
    for row, (gap, value, seen) in enumerate(zip(gaps.tolist(), data.values, data.seen, strict=True)):
        added = step_noise(noise, gap)
        state = predict(state, gap, added.level, added.slope)
        p = state.covariance._replace(cross=state.covariance.cross + added.cross)
        state = state._replace(covariance=p)
        means[row] = state.level, state.slope
        covariances[row] = (p.level, p.cross), (p.cross, p.slope)
        if seen:
            innovation = -state.level
            innovation[0] += value
            innovations[row], variances[row] = innovation, p.level + noise.measurement
            state = update(state, innovation, noise.measurement)
    return Pass(means, covariances, innovations, variances, gaps)


def predictions(passed: Pass) -> tuple[FloatArray, FloatArray]:
    """Innovations and their variances when the unknowns are solved for from the rows before alone; shapes ``(n,)``.

    Nan for the rows without a value, and for the first ``unknowns`` values, which nothing predicts.
    """
    v, f = passed.innovations, passed.variances
    unknowns = v.shape[1] - 1
    innovations, variances = np.full(len(v), np.nan), np.full(len(v), np.nan)
    rows = np.flatnonzero(~np.isnan(f))
    scaled = v[rows] / np.sqrt(f[rows, None])
    products = np.cumsum(scaled[:, :, None] * scaled[:, None, :], axis=0)[unknowns - 1 : -1]
    rows = rows[unknowns:]
    right = np.concatenate([-products[:, 1:, :1], v[rows, 1:, None]], axis=2)
    solved = np.linalg.solve(products[:, 1:, 1:], right)
    innovations[rows] = v[rows, 0] + (v[rows, 1:] * solved[:, :, 0]).sum(1)
    variances[rows] = f[rows] + (v[rows, 1:] * solved[:, :, 1]).sum(1)
    return innovations, variances


def backward(passed: Pass) -> tuple[FloatArray, FloatArray]:
    """Smoothed means ``(n, 2)`` and covariances ``(n, 2, 2)`` given all rows.

    ``r_{t-1} = H' v_t / F_t + L_t' r_t`` and ``N_{t-1} = H' H / F_t + L_t' N_t L_t``; then ``x_t + P_t r_{t-1}`` and
    ``P_t - P_t N_{t-1} P_t``. It is the Rauch-Tung-Striebel smoother without its inverse, which a slope without noise
    makes singular.
    """
    n, _, m = passed.means.shape
    r, big_n = np.zeros((2, m)), np.zeros((2, 2))
    means, covariances = np.empty((n, 2, m)), np.empty((n, 2, 2))
    after = np.eye(2)  # transition to the row that follows
    for row in range(n - 1, -1, -1):
        p, f = passed.covariances[row], passed.variances[row]
        r, big_n, seen = after.T @ r, after.T @ big_n @ after, not np.isnan(f)
        if seen:
            kept = np.eye(2)
            kept[:, 0] -= p[:, 0] / f
            r, big_n = kept.T @ r, kept.T @ big_n @ kept
            r[0] += passed.innovations[row] / f
            big_n[0, 0] += 1.0 / f
        means[row] = passed.means[row] + p @ r
        covariances[row] = p - p @ big_n @ p
        after = np.array([[1.0, passed.gaps[row]], [0.0, 1.0]])
    rows = ~np.isnan(passed.variances)
    scaled = passed.innovations[rows] / np.sqrt(passed.variances[rows, None])
    inverse = np.linalg.inv(scaled[:, 1:].T @ scaled[:, 1:])
    unknown = -inverse @ (scaled[:, 1:].T @ scaled[:, 0])
    response = means[:, :, 1:]
    return means[:, :, 0] + response @ unknown, covariances + response @ inverse @ response.transpose(0, 2, 1)
