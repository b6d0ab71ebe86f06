"""Features of a run that know no unit: what the engine saw, summarised over the last few steps and the last many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import Measurement

#: What one step is described by. Growth is the logarithm of a ratio; what is given back is a share of the progress.
INPUTS = (
    "loss innovation", "gradient innovation", "step-length innovation", "buffer innovation", "trajectory innovation",
    "rank of the trajectory noise", "loss drift", "loss over its lowest level",
    "loss given back", "loss level given back", "gradient growth", "speed growth",
    "learning rate over its certified range", "learning rate change",
    "probe given back", "probe over its allowance", "probe innovation",
)  # fmt: skip
#: How each is summarised.
SUMMARIES = ("mean of 4 steps", "mean of 20 steps", "peak")
#: Names of `FeatureBank`'s features, in order.
FEATURES = tuple(f"{name}, {summary}" for summary in SUMMARIES for name in INPUTS)

#: Statistics of the engine that are read, in the order in which `_Numbers` holds them.
_NEEDED = (
    "z_loss", "z_gradient", "z_gain", "z_buffers", "z_trajectory", "rank", "drift_m", "drift_x", "loss_level", "speed",
    "y", "predicted", "scale", "y0", "y_best", "allowance",
)  # fmt: skip
_FAST, _SLOW, _DECAY = 1.0 / 4.0, 1.0 / 20.0, 0.95
#: Gain of the levels that growth is measured from.
_LEVEL_GAIN = 0.01
#: Relative growth per step that the certified range of the learning rate follows, as in `LearningRateExcursion`.
_RANGE_GROWTH = math.log(1.01)
#: Steps whose learning rates belong to the range from the beginning.
_WARMUP_STEPS = 30
#: Bounds of a log ratio, and of what is given back: a share of 147 counts as no more harm than a share of e^5.
_LARGEST = 5.0
_NOTHING = (0.0,) * len(INPUTS)

_Known = tuple[int, float, float, float, float, float, float, tuple[float, float, float]]


class FeatureState(NamedTuple):
    """What earlier steps have left: reference levels (``nan`` before there is one), the last probe, the summaries."""

    seen: int = 0
    first_loss: float = math.nan
    lowest_level: float = math.inf
    gradient: float = math.nan
    speed: float = math.nan
    rate: float = math.nan
    rate_range: float = -math.inf
    probe: tuple[float, float, float] = (0.0, 0.0, 0.0)
    fast: tuple[float, ...] = _NOTHING
    slow: tuple[float, ...] = _NOTHING
    peak: tuple[float, ...] = _NOTHING

    @property
    def features(self) -> tuple[float, ...]:
        """The features, in the order of `FEATURES`."""
        return (*self.fast, *self.slow, *self.peak)


class FeatureBank:
    """Fold ``(measurement, statistics)`` into 51 features; nothing of a later step enters.

    Every input is free of units. Innovations come in standard deviations and enter as ``asinh z``; norms and learning
    rates as ``log(now / moving level)``; losses as the share of the progress so far that they give back, as
    ``log(1 + share)``. Each is then averaged with gains 1/4 and 1/20, and its largest value is kept with a decay of 5 %
    a step::

        f <- f + (x - f) / 4        s <- s + (x - s) / 20        p <- max(x, 0.95 p)

    Parameters
    ----------
    statistics
        Names of `Decision.statistics` in their order: `kalmanguard.engine.STATISTICS`, or what a journal's header says.

    Raises
    ------
    ConfigurationError
        A statistic that is needed is not among them.

    Notes
    -----
    The number of the step is no feature, nor is the length of the run: a predictor must not learn when its training
    faults came. What a step did not show (no loss passed, no buffers, a value that is not finite) counts as zero; what
    the last probe showed stays until the next one. The engine confirms non-finite values itself.
    Guarantee: none of its own; unchanged when losses and norms are given in another unit, up to rounding and the
    engine's own absolute floors. Cost: part of the predictor's (`FailurePredictor`).

    Examples
    --------
    >>> from kalmanguard.engine import STATISTICS, Engine
    >>> from kalmanguard.settings import Settings
    >>> engine, bank, features = Engine(Settings()), FeatureBank(STATISTICS), FeatureState()
    >>> state = engine.init()
    >>> for step in range(1, 101):
    ...     m = Measurement(step=step, loss=1.0 / step, learning_rates=(0.1 * 1.05 ** max(0, step - 80),))
    ...     state, decision = engine.step(state, m)
    ...     features = bank.step(features, m, decision.statistics)
    >>> dict(zip(FEATURES, features.features))["learning rate over its certified range, mean of 4 steps"] > 0.5
    True
    """

    def __init__(self, statistics: Sequence[str]) -> None:
        missing = [name for name in _NEEDED if name not in statistics]
        if missing:
            raise ConfigurationError(
                f"The statistics hold no {', '.join(missing)}, which the features are made from; pass "
                "kalmanguard.engine.STATISTICS, or the names in the journal's header."
            )
        self._size = len(statistics)
        self._pick = itemgetter(*(statistics.index(name) for name in _NEEDED))

    def step(self, state: FeatureState, m: Measurement, statistics: Sequence[float]) -> FeatureState:
        """Fold in one step; one without statistics (an unsupervised step) changes nothing."""
        if len(statistics) != self._size:
            return state
        known, inputs = self._inputs(state, m, self._pick(statistics))
        return FeatureState(
            *known,
            tuple([f + _FAST * (x - f) for f, x in zip(state.fast, inputs, strict=True)]),
            tuple([s + _SLOW * (x - s) for s, x in zip(state.slow, inputs, strict=True)]),
            tuple([x if x > _DECAY * p else _DECAY * p for p, x in zip(state.peak, inputs, strict=True)]),
        )

    def _inputs(
        self, state: FeatureState, m: Measurement, values: tuple[float, ...]
    ) -> tuple[_Known, tuple[float, ...]]:
        """What is to be known of this step later on (the first fields of the state), and the inputs."""
        z_loss, z_gradient, z_gain, z_buffers, z_trajectory, rank, drift_m, drift_x, level, speed = values[:10]
        first, lowest = state.first_loss, state.lowest_level
        loss_lost = level_lost = 0.0
        if m.loss is not None and math.isfinite(m.loss):
            if first != first:
                first = m.loss
            lowest = level if -math.inf < level < lowest else lowest
            loss_lost, level_lost = _given_back(m.loss, first, lowest), _given_back(level, first, lowest)
        gradient, gradient_growth = _growth(state.gradient, m.gradient_norm)
        pace, speed_growth = _growth(state.speed, speed)
        applied = max(m.learning_rates, default=0.0) * m.lr_factor
        rate, rate_change = _growth(state.rate, applied)
        rate_range, excursion = state.rate_range, 0.0
        if 0.0 < applied < math.inf:
            now = math.log(applied)
            if state.seen >= _WARMUP_STEPS:
                excursion = min(max(now - rate_range, 0.0), _LARGEST)
                rate_range = max(rate_range, min(now, rate_range + _RANGE_GROWTH))
            else:
                rate_range = max(rate_range, now)
        probe = _probe(state.probe, *values[10:])
        inputs = (
            _bounded(z_loss), _bounded(z_gradient), _bounded(z_gain), _bounded(z_buffers), _bounded(z_trajectory),
            math.log(rank) if 1.0 <= rank < math.inf else 0.0,
            math.log1p(drift_m) if 0.0 <= drift_m < math.inf else 0.0,
            drift_x if -1.0 <= drift_x <= 1.0 else 0.0,
            loss_lost, level_lost, gradient_growth, speed_growth, excursion, rate_change, *probe,
        )  # fmt: skip
        known = (state.seen + 1, first, lowest, gradient, pace, rate, rate_range, probe)
        return known, inputs


def _bounded(z: float) -> float:
    """Compress an innovation; one that was not seen counts as none."""
    return math.asinh(z) if -math.inf < z < math.inf else 0.0


def _given_back(value: float, first: float, lowest: float) -> float:
    """``log(1 + share)`` of the progress that a value gives back, within [0, 5]."""
    progress = first - lowest
    if not (progress > 0.0 and value > lowest):
        return 0.0
    share = (value - lowest) / progress
    return min(math.log1p(share), _LARGEST)


def _growth(level: float, value: float | None) -> tuple[float, float]:
    """Move the logarithmic level towards a value, and say how far above it that lies; no more than e^5 either way."""
    if value is None or not 0.0 < value < math.inf:
        return level, 0.0
    now = math.log(value)
    if level != level:
        return now, 0.0
    growth = min(max(now - level, -_LARGEST), _LARGEST)
    return level + _LEVEL_GAIN * growth, growth


def _probe(
    before: tuple[float, float, float],
    y: float,
    predicted: float,
    scale: float,
    start: float,
    best: float,
    allowed: float,
) -> tuple[float, float, float]:
    """What the last probe gave back, of the progress and of its allowance, and its innovation."""
    if not -math.inf < y < math.inf:
        return before
    strain = (y - best) / allowed if y > best and 0.0 < allowed < math.inf else 0.0
    innovation = (y - predicted) / scale if scale > 0.0 else 0.0
    return _given_back(y, start, best), min(math.log1p(strain), _LARGEST), _bounded(innovation)
