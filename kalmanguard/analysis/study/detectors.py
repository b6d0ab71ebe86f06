"""Families of damping detectors: one statistic each over the velocities, larger where it is more alarming."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kalmanguard.analysis.study.linear import pole_damping
from kalmanguard.detectors.damping import DRIFT, SNAP, jerk_ratio, poles
from kalmanguard.detectors.oscillation import period_two
from kalmanguard.estimators.autocovariance import (
    BLOCK,
    BLOCKS,
    LAGS,
    AutocovarianceState,
    Moments,
    jackknife,
    observe,
    total,
)
from kalmanguard.estimators.noise import CLIP, Scale, track
from kalmanguard.records import FloatArray

#: Blocks before the first judgement: half of them are the past that two of the families compare with.
FIRST = 2 * BLOCKS
#: Velocities after which there is a first reading.
START = LAGS + 2 + FIRST * BLOCK
#: Half width of the intervals in standard errors, as in `jackknife`.
DEVIATIONS = 2.5
#: Statistics are cut off here: beyond it the size says nothing.
LARGEST = 1e6
#: Blocks over which the past is averaged, and the least deviation it is credited with, as in the supervisor.
_MEMORY, _FLOOR = 20, 0.02


class Rule(NamedTuple):
    """A threshold that somebody proposes: alarm where the family's statistic is at least so large."""

    name: str
    family: str
    threshold: float


def ratio_statistic(blocks: Sequence[Moments]) -> float:
    """Root mean square of the jerk over that of the acceleration, in the window."""
    return jerk_ratio(total(blocks))


def modulus_statistic(blocks: Sequence[Moments]) -> float:
    """Modulus of the largest pole, by instruments."""
    return _modulus(total(blocks))


def modulus_score(blocks: Sequence[Moments]) -> float:
    """Standard errors by which the largest pole lies outside the unit circle, ``(|z| - 1) / se``.

    At least 2.5 where the lower bound of ``|z|`` is beyond 1, at least -2.5 where the upper bound is, and at least 0
    where the estimate is: one family for the three gates. Where no standard error is known it is zero but for the sign.
    """
    interval = jackknife(blocks, _modulus, deviations=DEVIATIONS)
    error = (interval.high - interval.low) / (2.0 * DEVIATIONS)
    excess = interval.estimate - 1.0
    return math.copysign(1e-12, excess) if math.isinf(error) and not math.isnan(excess) else excess / max(error, 1e-12)


def damping_statistic(blocks: Sequence[Moments]) -> float:
    """Minus the damping ratio of the largest pole."""
    return -_damping(total(blocks))


def damping_bound_statistic(blocks: Sequence[Moments]) -> float:
    """Minus the upper confidence bound of that damping ratio: of the pole with the lower bound of the modulus.

    A jackknife of the damping ratio itself would have no width where the pole is real, and the ratio 1 or -1.
    """
    found = poles(total(blocks))
    low = jackknife(blocks, _modulus, deviations=DEVIATIONS).low
    if not found or math.isnan(low):
        return math.nan
    return -pole_damping(cmath.rect(low, cmath.phase(max(found, key=abs))))[0] if low > 0.0 else -1.0


def alternation_statistic(blocks: Sequence[Moments]) -> float:
    """Minus the mean cosine between neighbouring updates."""
    return -period_two(blocks).estimate


def against_past(values: Iterable[float]) -> list[float]:
    """Deviations of every value from the clipped exponential mean of those before it, as the supervisor takes them.

    Nan for the first nine, while there is no past, and for values that are nan.

    Examples
    --------
    >>> scores = against_past([0.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 5.0])
    >>> round(scores[-1], 2), all(map(math.isnan, scores[:-1]))
    (4.94, True)
    """
    scores: list[float] = []
    mean, spread = math.nan, Scale()
    for value in values:
        if math.isnan(value) or math.isnan(mean):
            scores.append(math.nan)
            mean = value if math.isnan(mean) else mean
            continue
        off, deviation = value - mean, max(spread.deviation, _FLOOR)
        scores.append(off / deviation if spread.seen >= BLOCKS else math.nan)
        mean += max(-CLIP, min(CLIP, off / deviation)) * deviation / _MEMORY
        spread = track(spread, off, _MEMORY)
    return scores


#: Families whose statistic is one of the window alone.
WINDOWED: dict[str, Callable[[Sequence[Moments]], float]] = {
    "jerk ratio": ratio_statistic,
    "pole, estimate": modulus_statistic,
    "pole, standard errors": modulus_score,
    "damping ratio, estimate": damping_statistic,
    "damping ratio, upper bound": damping_bound_statistic,
    "alternation": alternation_statistic,
}
#: Families that hold the last block against the run's own past: the jerk ratio both ways, and, as the yardstick that
#: knows nothing of damping, the length of the updates upwards.
CALIBRATED = ("jerk ratio, own past", "update length, own past")
FAMILIES = (*WINDOWED, *CALIBRATED)

#: Thresholds of the damping ratio that are compared.
ZETAS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
RULES = (
    Rule("jerk ratio > 0.707", "jerk ratio", DRIFT),
    Rule("jerk ratio > 1.414", "jerk ratio", SNAP),
    Rule("jerk ratio 8 deviations off its past", "jerk ratio, own past", 8.0),
    Rule("upper bound of |z| ≥ 1", "pole, standard errors", -DEVIATIONS),
    Rule("estimate of |z| ≥ 1", "pole, standard errors", 0.0),
    Rule("lower bound of |z| ≥ 1", "pole, standard errors", DEVIATIONS),
    *(Rule(f"estimate of ζ < {zeta:g}", "damping ratio, estimate", -zeta) for zeta in ZETAS[1:]),
    *(Rule(f"upper bound of ζ < {zeta:g}", "damping ratio, upper bound", -zeta) for zeta in ZETAS),
    Rule("mean cosine < -0.5", "alternation", 0.5),
    Rule("update length 8 deviations above its past", "update length, own past", 8.0),
)


class Readings(NamedTuple):
    """Statistics at the ends of blocks: ``steps`` are counts of velocities; nan where a family abstains."""

    steps: tuple[int, ...]
    values: dict[str, tuple[float, ...]]


def blocks_of(velocities: FloatArray) -> tuple[Moments, ...]:
    """All finished blocks of velocities of shape ``(steps, k)``, from steps in a row."""
    state, found = AutocovarianceState(), []
    for velocity in velocities:
        before, state = state.blocks, observe(state, velocity)
        if state.blocks is not before and state.filled == 0 and state.blocks:
            found.append(state.blocks[-1])
    return tuple(found)


def read(velocities: FloatArray) -> Readings:
    """Evaluate every family at the end of every block, from the sixteenth on, over the last eight blocks.

    Parameters
    ----------
    velocities
        Shape ``(steps, k)``, finite, per unit of learning rate.

    Notes
    -----
    Cost: about a quarter of a millisecond a block.

    Examples
    --------
    >>> readings = read(np.random.default_rng(0).normal(size=(START + BLOCK, 8)))
    >>> readings.steps, [round(value, 1) for value in readings.values["jerk ratio"]]
    ((262, 278), [1.7, 1.7])
    """
    blocks = blocks_of(velocities)
    ends = range(FIRST, len(blocks) + 1)
    values = {
        family: tuple(_cut(statistic(blocks[end - BLOCKS : end])) for end in ends)
        for family, statistic in WINDOWED.items()
    }
    for family, series in zip(CALIBRATED, (map(_log_ratio, blocks), map(_log_length, blocks)), strict=True):
        scores = against_past(series)[FIRST - 1 :]
        values[family] = tuple(_cut(abs(score) if family == CALIBRATED[0] else score) for score in scores)
    return Readings(tuple(LAGS + 2 + BLOCK * end for end in ends), values)


def records(steps: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    """The steps at which a series is larger than ever before: where it first reaches *any* threshold.

    Examples
    --------
    >>> records([16, 32, 48], [1.0, 0.5, 2.0])
    [(16, 1.0), (48, 2.0)]
    """
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value > -math.inf]
    highest = np.maximum.accumulate([-math.inf, *(value for _, value in known)])
    return [point for point, (before, now) in zip(known, pairwise(highest), strict=True) if now > before]


def _cut(value: float) -> float:
    return value if math.isnan(value) or (math.isinf(value) and value < 0.0) else max(-LARGEST, min(LARGEST, value))


def _modulus(m: Moments) -> float:
    return max(map(abs, poles(m)), default=math.nan)


def _damping(m: Moments) -> float:
    found = poles(m)
    return pole_damping(max(found, key=abs))[0] if found else math.nan


def _log_ratio(m: Moments) -> float:
    ratio = jerk_ratio(m)
    return math.log(ratio) if ratio > 0.0 else math.nan


def _log_length(m: Moments) -> float:
    return 0.5 * math.log(m.power / BLOCK) if m.power > 0.0 else math.nan
