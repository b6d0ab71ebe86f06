"""Constant-velocity Kalman filter over the sketched parameter trajectory, per unit of learning rate."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kalmanguard.estimators.noise import CLIP
from kalmanguard.records import FloatArray

#: Share of the velocity's innovation variance that is drift of the mean velocity; sets the gain to about 0.1.
_DRIFT = 0.01
_MEMORY = 100


class TrajectoryState(NamedTuple):
    """Mean update per unit of learning rate, its shared variance, and the moments of the innovation energy.

    ``length`` is how long the next observed velocity is expected to be per unit of learning rate, 0 while that is not
    known; where the sketch is taken at every n-th step, that is the displacement over n steps.
    """

    direction: FloatArray | None = None
    variance: float = 1.0
    energy: float = 0.0
    energy_square: float = 0.0
    seen: int = 0
    length: float = 0.0


class TrajectoryInnovation(NamedTuple):
    """What one observed velocity held that the filter did not predict.

    ``nis`` is the innovation energy over its expectation, ``rank`` the effective number of coordinates among which it
    is spread, ``normalised`` the cube-root (Wilson-Hilferty) normal score.
    """

    nis: float
    rank: float
    normalised: float


class TrajectoryFilter:
    """Filter ``s_t = s_{t-1} + eta_t d_t + w_t`` with ``d_t`` a random walk, over k sketched coordinates at once.

    The learning rate eta is a known input, so a schedule causes no innovation. With exactly observed positions the
    constant-velocity filter on positions reduces to this local-level filter on velocities: all k coordinates share one
    gain. The innovation energy ``q = ||nu||^2`` is judged by its own tracked moments: gradient noise has low rank, so q
    is not chi-square with k degrees of freedom but about ``E q * chi^2_r / r`` with ``r = 2 (E q)^2 / Var q``.

    Notes
    -----
    Guarantee: HEURISTIC (Gaussian noise of slowly varying covariance; moments are estimated). Cost: about 10 us at
    k = 64.

    References
    ----------
    Bar-Shalom, Li, Kirubarajan, "Estimation with Applications to Tracking and Navigation", 2001, section 6.3;
    Satterthwaite, Biometrics Bulletin 2 (1946), for the effective degrees of freedom;
    Wilson, Hilferty, PNAS 17 (1931), for the normal score.
    """

    def step(
        self, state: TrajectoryState, velocity: FloatArray, learning_rate: float
    ) -> tuple[TrajectoryState, TrajectoryInnovation | None]:
        """Take in one finite velocity, shape ``(k,)``; no innovation is reported before there is a prediction."""
        rate = learning_rate if learning_rate > 0 else 1.0
        observed = velocity / rate
        if state.direction is None:
            return TrajectoryState(direction=observed), None
        innovation = observed - state.direction
        q = float(np.dot(innovation, innovation))
        ahead = state.variance + _DRIFT
        gain = ahead / (ahead + 1.0)
        n = state.seen + 1
        known = state.seen >= 5 and state.energy > 0
        result = None
        clipped = q
        if known:
            rank = self.rank(state, len(velocity))
            nis = q / state.energy
            score = (nis ** (1.0 / 3.0) - (1.0 - 2.0 / (9.0 * rank))) / math.sqrt(2.0 / (9.0 * rank))
            result = TrajectoryInnovation(nis, rank, score)
            # The energy's own 3-sigma point; an outlier counts as that much and no more.
            clipped = min(q, state.energy * (1.0 + CLIP * math.sqrt(2.0 / rank)))
            if q > clipped:
                innovation = innovation * math.sqrt(clipped / q)
        weight = max(1.0 / _MEMORY, 1.0 / n)
        direction = state.direction + gain * innovation
        energy = state.energy + weight * (clipped - state.energy)
        # Expected squared length of the next update: that of the mean direction, and of the noise about it.
        length = math.sqrt(float(np.dot(direction, direction)) + energy) if n >= 5 else 0.0
        return (
            TrajectoryState(
                direction,
                (1.0 - gain) * ahead,
                energy,
                state.energy_square + weight * (clipped * clipped - state.energy_square),
                n,
                length,
            ),
            result,
        )

    @staticmethod
    def rank(state: TrajectoryState, size: int) -> float:
        """Effective degrees of freedom of the innovation energy, between 1 and ``size``."""
        spread = state.energy_square - state.energy * state.energy
        if spread <= 0:
            return float(size)
        return min(float(size), max(1.0, 2.0 * state.energy * state.energy / spread))
