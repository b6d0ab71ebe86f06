"""Lagged products of the sketched velocity by blocks of steps: what damping, poles and alternation are read from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kalmanguard.records import FloatArray

#: Largest lag: AR(2) poles by instruments need the third and the fourth.
LAGS = 4
#: Steps of a block; velocities remember each other for fewer.
BLOCK = 16
#: Blocks that are kept: a window of 128 steps.
BLOCKS = 8


class Moments(NamedTuple):
    """Sums of products of velocities over the steps t of a block.

    ``power`` is ``v_t . v_t`` and ``neighbours`` ``v_t . v_{t-1}``; ``acceleration`` and ``jerk`` are the squared
    lengths of the first and second differences; ``ab`` of the others stands for ``v_{t-a} . v_{t-b}``. Shifted products
    are kept apart although a stationary process makes them equal: one that grows does not.
    """

    power: float = 0.0
    neighbours: float = 0.0
    acceleration: float = 0.0
    jerk: float = 0.0
    v02: float = 0.0
    v12: float = 0.0
    v03: float = 0.0
    v13: float = 0.0
    v23: float = 0.0
    v04: float = 0.0
    v14: float = 0.0
    v24: float = 0.0


#: ``v_t . v_{t-h}`` of one step for h = 0 to 4.
Products = tuple[float, float, float, float, float]


class AutocovarianceState(NamedTuple):
    """The last velocities and their products, the unfinished block and its length, and the finished ones, in order."""

    velocities: tuple[FloatArray, ...] = ()
    products: tuple[Products, ...] = ()
    sums: Moments = Moments()
    filled: int = 0
    blocks: tuple[Moments, ...] = ()


def observe(state: AutocovarianceState, velocity: FloatArray) -> AutocovarianceState:
    """Take in one finite velocity, shape ``(k,)``.

    Lags are steps between velocities, so all velocities must be from steps in a row: after a break start from a new
    state. Cost: five dot products of k numbers.
    """
    past = state.velocities
    if len(past) < LAGS:
        return state._replace(velocities=(velocity, *past))
    d: Products = tuple([float(velocity.dot(other)) for other in (velocity, *past)])  # type: ignore[assignment]
    kept = (velocity, *past[: LAGS - 1])
    if len(state.products) < 2:
        return state._replace(velocities=kept, products=(d, *state.products))
    e, f = state.products
    s = state.sums
    sums = Moments(
        s.power + d[0],
        s.neighbours + d[1],
        s.acceleration + (d[0] + e[0] - 2.0 * d[1]),
        s.jerk + (d[0] + 4.0 * (e[0] - d[1] - e[1]) + f[0] + 2.0 * d[2]),
        s.v02 + d[2], s.v12 + e[1], s.v03 + d[3], s.v13 + e[2], s.v23 + f[1], s.v04 + d[4], s.v14 + e[3], s.v24 + f[2],
    )  # fmt: skip
    if state.filled + 1 < BLOCK:
        return AutocovarianceState(kept, (d, e), sums, state.filled + 1, state.blocks)
    return AutocovarianceState(kept, (d, e), Moments(), 0, (*state.blocks[1 - BLOCKS :], sums))


def total(blocks: Sequence[Moments]) -> Moments:
    """Sums over all blocks."""
    return Moments(*map(math.fsum, zip(*blocks, strict=True)))


class Interval(NamedTuple):
    """An estimate with the bounds of its confidence interval, in the unit of the estimate."""

    estimate: float
    low: float
    high: float


def jackknife(blocks: Sequence[Moments], statistic: Callable[[Moments], float], *, deviations: float = 2.5) -> Interval:
    """A statistic of the summed products, with bounds from leaving out one block at a time.

    Parameters
    ----------
    blocks
        At least two.
    statistic
        Nan where it is not defined.
    deviations
        Half width of the interval in standard errors; 2.5 is about the 95 % point of Student's t with 6 degrees of
        freedom.

    Notes
    -----
    Guarantee: ASYMPTOTIC (blocks longer than the memory of the velocities, a smooth statistic); where the statistic is
    nan for any subset the bounds are infinite. Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, section
    11.5; Kuensch, Annals of Statistics 17 (1989), for blocks.

    Examples
    --------
    >>> blocks = (Moments(power=4.0, neighbours=1.0), Moments(power=4.0, neighbours=3.0))
    >>> jackknife(blocks, lambda m: m.neighbours / m.power, deviations=1.0)
    Interval(estimate=0.5, low=0.25, high=0.75)
    """
    n = len(blocks)
    summed = total(blocks)
    estimate = statistic(summed)
    without = [statistic(Moments(*[a - b for a, b in zip(summed, block, strict=True)])) for block in blocks]
    if not all(map(math.isfinite, (estimate, *without))):
        return Interval(estimate, -math.inf, math.inf)
    mean = math.fsum(without) / n
    error = math.sqrt((n - 1) / n * math.fsum((value - mean) ** 2 for value in without))
    return Interval(estimate, estimate - deviations * error, estimate + deviations * error)
