"""Regimes: an interacting-multiple-model filter of one channel's innovations, with weights in the log domain."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kalmanguard.records import FloatArray

#: What a channel may be in, in the order of all arrays here.
REGIMES = ("nominal", "oscillating", "diverging", "snapped")
#: Per regime: decay of the shift, decay of the oscillation, their process noise, variance of the measurement.
#: The unit is the channel's own healthy deviation. Nominal innovations forget a shift at once; diverging ones keep it;
#: oscillating ones turn its sign at every step; snapped ones are 30 times as wide and mean nothing else.
_SHIFT_DECAY = np.array([0.5, 0.5, 1.0, 0.5])
_TURN_DECAY = np.array([0.0, -0.95, 0.0, 0.0])
_SHIFT_NOISE = np.array([0.01, 0.01, 0.25, 0.01])
_TURN_NOISE = np.array([1e-6, 1.0, 1e-6, 1e-6])
_MEASURED = np.array([1.0, 1.0, 1.0, 900.0])
#: Chance per step of leaving a regime, shared equally; healthy training is left about once in a thousand steps.
_LEAVES = np.array([0.001, 0.05, 0.05, 0.2])


def _transitions() -> FloatArray:
    matrix = np.repeat(_LEAVES[:, None] / (len(REGIMES) - 1), len(REGIMES), axis=1)
    np.fill_diagonal(matrix, 1.0 - _LEAVES)
    return matrix


TRANSITIONS = _transitions()
_LOG_TRANSITIONS = np.log(TRANSITIONS)


class RegimeState(NamedTuple):
    """Log probabilities ``(4,)``, means ``(4, 2)`` and covariances ``(4, 2, 2)`` of (shift, oscillation)."""

    log_probabilities: FloatArray
    means: FloatArray
    covariances: FloatArray

    @property
    def probabilities(self) -> FloatArray:
        """Of `REGIMES`, shape ``(4,)``; they sum to 1."""
        exact: FloatArray = np.exp(self.log_probabilities)
        return exact


class RegimeFilter:
    """Which regime do normalised innovations come from?

    Every regime is a Kalman filter of ``z = shift + oscillation + noise`` with dynamics of its own; the four interact
    through a Markov chain. Likelihoods enter as logarithms, so that an innovation of a thousand deviations moves the
    probabilities instead of underflowing all of them to zero (a stock implementation then falls back to the prior and
    reports health).

    Notes
    -----
    Guarantee: HEURISTIC (the models' constants are a choice, not fitted; the mixing step approximates). It looks at one
    channel and adds to no decision by default: switch it on with ``detectors``. Cost: some twenty small
    array operations a step.

    References
    ----------
    Blom, Bar-Shalom, IEEE Trans. Automatic Control 33 (1988).

    Examples
    --------
    >>> filter, state = RegimeFilter(), RegimeFilter.init()
    >>> for z in (0.4, -1.1, 0.2, 0.8):
    ...     state = filter.step(state, z)
    >>> REGIMES[int(state.probabilities.argmax())]
    'nominal'
    >>> state = filter.step(state, 1000.0)
    >>> REGIMES[int(state.probabilities.argmax())]
    'snapped'
    """

    @staticmethod
    def init() -> RegimeState:
        """The state before the first innovation: nominal but for what the chain's own chance says."""
        prior = np.array([0.997, 0.001, 0.001, 0.001])
        return RegimeState(np.log(prior), np.zeros((4, 2)), np.tile(np.eye(2), (4, 1, 1)))

    def step(self, state: RegimeState, z: float) -> RegimeState:
        """Take in one finite normalised innovation."""
        joint = state.log_probabilities[:, None] + _LOG_TRANSITIONS
        log_prior = _log_sum(joint)
        weights = np.exp(joint - log_prior)  # of the regime before (row), given the one now (column)
        means = weights.T @ state.means
        apart = state.means[:, None, :] - means[None, :, :]
        spread = state.covariances[:, None] + apart[..., :, None] * apart[..., None, :]
        covariances = np.einsum("ij,ijab->jab", weights, spread)
        # Time update: both coordinates evolve by themselves.
        decay = np.stack([_SHIFT_DECAY, _TURN_DECAY], axis=1)
        means = decay * means
        covariances = decay[:, :, None] * covariances * decay[:, None, :]
        covariances[:, 0, 0] += _SHIFT_NOISE
        covariances[:, 1, 1] += _TURN_NOISE
        # Measurement update with H = (1, 1).
        cross = covariances.sum(2)
        total = cross.sum(1) + _MEASURED
        innovation = z - means.sum(1)
        gain = cross / total[:, None]
        means = means + gain * innovation[:, None]
        covariances = covariances - gain[:, :, None] * cross[:, None, :]
        log_likelihood = -0.5 * (np.log(2.0 * math.pi * total) + innovation * innovation / total)
        log_posterior = log_prior + log_likelihood
        return RegimeState(log_posterior - _log_sum(log_posterior), means, covariances)


def _log_sum(x: FloatArray) -> FloatArray:
    """Logarithm of the sum of exponentials down the first axis."""
    top = x.max(0)
    total: FloatArray = top + np.log(np.exp(x - top).sum(0))
    return total
