"""The probe predicted from the trajectory: held-out loss against path travelled, not against steps."""

from __future__ import annotations

from typing import NamedTuple

from kalmanguard.estimators.noise import CLIP, Scale, track
from kalmanguard.estimators.statespace import Covariance, Gaussian, predict, update


class ProbeState(NamedTuple):
    """Filter over (level, slope per unit path), the noise scale, the path since the last probe, and its usual length.

    ``paths`` and ``squares`` are forgetting sums of path and squared path between probes: their ratio is the usual
    length, weighted by length, so that extra probes at short distances do not change it.
    """

    gaussian: Gaussian[float] | None = None
    scale: Scale = Scale()
    path: float = 0.0
    paths: float = 0.0
    squares: float = 0.0


class ProbePrediction(NamedTuple):
    """Predicted probe, its standard deviation, and whether the deviation is learned yet."""

    level: float
    deviation: float
    ready: bool


#: Process noise per usual distance between probes, in units of the measurement noise.
_LEVEL_NOISE = 0.05
_SLOPE_NOISE = 0.05
_MEMORY = 30
_FORGETTING = 0.95


class ProbeFilter:
    """Kalman filter for ``l <- l - c * path``, with the path that the *trajectory filter predicted*.

    The clock is the path travelled, in units of the usual distance between probes, so irregular probe times need no
    special case. The observed path is never used: a jump must
    not excuse the damage that it does.

    Notes
    -----
    Assumes that the loss falls about linearly with the path between two probes. Guarantee: HEURISTIC; its innovation
    is judged by its tracked scale, and claim C5 of the certificate says whether that was consistent. Cost: 1 us a
    step, 4 us a probe.
    """

    def travel(self, state: ProbeState, speed: float) -> ProbeState:
        """Advance the clock by one step's predicted path length."""
        return state._replace(path=state.path + speed)

    def predict(self, state: ProbeState, floor: float) -> ProbePrediction | None:
        """Predict the probe at the present position; ``floor`` bounds the deviation from below, in loss units."""
        ahead = self._ahead(state)
        if ahead is None:
            return None
        spread = (ahead.covariance.level + 1.0) ** 0.5
        return ProbePrediction(ahead.level, max(state.scale.deviation * spread, floor), state.scale.seen >= 3)

    def update(self, state: ProbeState, value: float, floor: float) -> ProbeState:
        """Take in one finite probe mean."""
        ahead = self._ahead(state)
        if ahead is None:
            return state._replace(gaussian=Gaussian(value, 0.0, Covariance(1.0, 0.0, 1.0)), path=0.0)
        innovation = value - ahead.level
        spread = (ahead.covariance.level + 1.0) ** 0.5
        scale = max(state.scale.deviation * spread, floor)
        # Only upward outliers are clipped: a loss that falls faster than predicted is no fault, and must be followed.
        clipped = min(innovation, CLIP * scale) if state.scale.seen >= 3 else innovation
        return state._replace(
            gaussian=update(ahead, clipped),
            scale=track(state.scale, innovation / spread, _MEMORY),
            path=0.0,
            paths=_FORGETTING * state.paths + state.path,
            squares=_FORGETTING * state.squares + state.path * state.path,
        )

    @staticmethod
    def _ahead(state: ProbeState) -> Gaussian[float] | None:
        if state.gaussian is None:
            return None
        dt = state.path * state.paths / state.squares if state.squares > 0 else 1.0
        # White-noise acceleration: the slope's variance grows with dt, and what it adds to the level with dt^3 / 3.
        level_noise = _LEVEL_NOISE * dt + _SLOPE_NOISE * dt**3 / 3.0
        return predict(state.gaussian, dt, level_noise, _SLOPE_NOISE * dt)
