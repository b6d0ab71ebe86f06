"""All estimators side by side: one measurement in, its innovations out."""

from __future__ import annotations

import math
from typing import NamedTuple

from kalmanguard.estimators.probe import ProbeFilter, ProbeState
from kalmanguard.estimators.trajectory import TrajectoryFilter, TrajectoryState
from kalmanguard.estimators.trend import TrendFilter, TrendState
from kalmanguard.estimators.wander import Wander
from kalmanguard.records import FloatArray, Innovation, Measurement

#: Channels of `Innovations`, in order.
CHANNELS = ("loss", "gradient", "gain", "buffers", "trajectory")
_GATE_DECAY = 0.999
#: Steps from which on a trend is known, and the largest exponent of a float.
_KNOWN, _LARGEST_LOG = 10, 700.0
#: Growth of the largest known gradient norm with every clipped step: gradients that have really grown a hundredfold are
#: followed within 25 steps, and ten bad ones do not fill the second moments with what was clipped.
_CLIPPED_GROWTH = 1.2


class Estimators(NamedTuple):
    """What a rollback rewinds."""

    trajectory: TrajectoryState = TrajectoryState()
    probe: ProbeState = ProbeState()
    loss: TrendState = TrendState()
    gradient: TrendState = TrendState()
    gain: TrendState = TrendState()
    buffers: TrendState = TrendState()
    largest_gradient: float = 0.0
    reference: FloatArray | None = None
    wander: Wander = Wander()


class Innovations(NamedTuple):
    """What one measurement held that was not predicted; ``None`` where a channel saw nothing.

    ``gain`` is the log of the update's length per unit of learning rate. ``nis`` and ``rank`` are those of the
    trajectory, ``speed`` the displacement that it predicted, in the unit of the sketch: a clock for the probe filter,
    which only compares distances.
    """

    loss: Innovation | None = None
    gradient: Innovation | None = None
    gain: Innovation | None = None
    buffers: Innovation | None = None
    trajectory: Innovation | None = None
    nis: float = math.nan
    rank: float = math.nan
    speed: float = 0.0

    @property
    def channels(self) -> tuple[Innovation | None, ...]:
        """The innovations in the order of `CHANNELS`."""
        return self[:5]


def usual_gradient(e: Estimators, deviations: float) -> float:
    """Gradient norm so many deviations above its trend; inf while that is not known."""
    trend = e.gradient
    if trend.level is None or trend.scale.seen < _KNOWN:
        return math.inf
    return math.exp(min(trend.level + deviations * trend.scale.deviation, _LARGEST_LOG))


class EstimatorBank:
    """Trends of the training loss and of the log norms, the trajectory filter, and the clock of the probe filter."""

    def __init__(self) -> None:
        self._trajectory = TrajectoryFilter()
        self._probe = ProbeFilter()
        self._loss = TrendFilter("loss", floor_frac=1e-3)
        self._gradient = TrendFilter("gradient", floor=0.05)
        self._gain = TrendFilter("gain", floor=0.05)
        self._buffers = TrendFilter("buffers", floor=0.02)

    def step(self, e: Estimators, m: Measurement) -> tuple[Estimators, Innovations]:
        """Take in what is finite of one measurement."""
        loss = gradient = gain = buffers = moved = None
        loss_state, gradient_state, gain_state, buffer_state = e.loss, e.gradient, e.gain, e.buffers
        largest = e.largest_gradient
        if m.loss is not None and math.isfinite(m.loss):
            loss_state, loss = self._loss.step(loss_state, m.loss)
        norm = m.gradient_norm
        if norm is not None and 0.0 < norm < math.inf:
            gradient_state, gradient = self._gradient.step(gradient_state, math.log(norm))
            if m.veto is None:
                largest = max(norm, largest * _GATE_DECAY)
            elif m.veto == "clipped":
                largest *= _CLIPPED_GROWTH
        if m.buffer_norm is not None and 0.0 < m.buffer_norm < math.inf:
            buffer_state, buffers = self._buffers.step(buffer_state, math.log(m.buffer_norm))
        trajectory_state, nis, rank = e.trajectory, math.nan, math.nan
        rate = max(m.learning_rates, default=0.0) * m.lr_factor
        applied = m.veto in (None, "clipped")
        # Every step counts alike, also those that the sketch leaves out.
        speed = max(rate, 0.0) * trajectory_state.length if applied else 0.0
        if m.velocity is not None and m.parameters_finite and applied:
            length = math.sqrt(float(m.velocity.dot(m.velocity)))
            # Below the rounding floor the velocity is arithmetic noise of the parameters' dtype: abstain.
            if length > m.rounding_floor and rate > 0:
                gain_state, gain = self._gain.step(gain_state, math.log(length / rate))
                trajectory_state, innovation = self._trajectory.step(trajectory_state, m.velocity, rate)
                if innovation is not None:
                    nis, rank = innovation.nis, innovation.rank
                    moved = Innovation("trajectory", innovation.normalised, 1.0)
        probe = self._probe.travel(e.probe, speed)
        return (
            Estimators(
                trajectory_state,
                probe,
                loss_state,
                gradient_state,
                gain_state,
                buffer_state,
                largest,
                e.reference,
                e.wander,
            ),
            Innovations(loss, gradient, gain, buffers, moved, nis, rank, speed),
        )
