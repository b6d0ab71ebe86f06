"""Damping of the parameter trajectory: jerk over acceleration, and the poles of its second-order model."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from kalmanguard.estimators.autocovariance import BLOCKS, Interval, Moments, jackknife, total

#: Jerk over acceleration as published for Zeta-Guard: above the first a "snap", above the second a "drift".
SNAP, DRIFT = math.sqrt(2.0), math.sqrt(0.5)
#: Determinant of the instruments' normal matrix, relative to its largest possible value, below which there is no
#: second pole to be seen.
_IDENTIFIED = 0.02
_WIDEST = 0.5


class DampingStatus(StrEnum):
    """Where the poles lie: inside the unit circle, not known to, outside."""

    STABLE = "STABLE"
    DRIFT = "DRIFT"
    CRITICAL = "CRITICAL"
    UNKNOWN = "UNKNOWN"


class Damping(NamedTuple):
    """What a window of the trajectory says about its damping.

    Attributes
    ----------
    status
        By the interval of the pole's modulus: CRITICAL when it lies outside the unit circle, STABLE when it lies
        inside, DRIFT when it contains 1, UNKNOWN while there are too few steps or no pole can be identified.
    confidence
        Between 0 and 1: how much of the interval's allowed width is not used; 0 when nothing is identified.
    ratio
        Jerk over acceleration, root mean squares, with its interval.
    raw_status
        What the published thresholds on ``ratio`` say. Velocities without memory give 1.73 and momentum of 0.9 gives
        1.45, so they call most training critical (`docs/research/damping.md`); kept for comparison.
    modulus
        Modulus of the largest pole, per step.
    damping_ratio, natural_frequency
        Of the pole with the largest modulus and its partner: zeta, and omega_n in radians per step; nan when not
        identified. Small damping ratios are normal: momentum 0.9 with eta lambda = 0.96 has zeta 0.05.
    recommendations
        What to do about it, in plain sentences.
    """

    status: DampingStatus
    confidence: float
    ratio: Interval
    raw_status: DampingStatus
    modulus: Interval
    damping_ratio: float
    natural_frequency: float
    recommendations: tuple[str, ...] = ()


def damping(blocks: Sequence[Moments]) -> Damping:
    """Judge the damping from blocks of lagged products (`kalmanguard.estimators.autocovariance`).

    Notes
    -----
    The poles solve ``z^2 = phi_1 z + phi_2`` in ``v_t = phi_1 v_{t-1} + phi_2 v_{t-2} + noise``, with ``v_{t-3}`` and
    ``v_{t-4}`` as instruments: white measurement noise does not bias them, where it makes least squares call everything
    overdamped. Where the two equations are nearly the same one, a single pole is reported.

    Guarantee: ASYMPTOTIC for a second-order process; training is not of second order, so gate on the interval, never on
    the estimate (instruments are weak: on small networks the estimate alone exceeds 1 in many healthy windows).
    Cost: some twenty evaluations of a closed form, once in 16 steps.

    References
    ----------
    Stoica, Soederstroem, Friedlander, IEEE Trans. Automatic Control 30 (1985), for the modified Yule-Walker equations;
    Polyak, USSR Comput. Math. 4 (1964), for the heavy ball.

    Examples
    --------
    Velocities that remember nothing: the ratio is that of a random walk.

    >>> result = damping((Moments(power=1.0, acceleration=2.0, jerk=6.0),) * 8)
    >>> round(result.ratio.estimate, 2), result.raw_status.value, result.status.value
    (1.73, 'CRITICAL', 'UNKNOWN')
    """
    if len(blocks) < BLOCKS // 2:
        nothing = Interval(math.nan, -math.inf, math.inf)
        unknown = DampingStatus.UNKNOWN
        return Damping(unknown, 0.0, nothing, unknown, nothing, math.nan, math.nan)
    ratio = jackknife(blocks, jerk_ratio)
    modulus = jackknife(blocks, lambda m: max(map(abs, poles(m)), default=math.nan))
    width = modulus.high - modulus.low
    zeta, frequency = second_order(poles(total(blocks)))
    if math.isnan(modulus.estimate) or not width < 4.0 * _WIDEST:
        status = DampingStatus.UNKNOWN
    elif modulus.low >= 1.0:
        status = DampingStatus.CRITICAL
    else:
        status = DampingStatus.STABLE if modulus.high < 1.0 else DampingStatus.DRIFT
    raw = (
        DampingStatus.CRITICAL if ratio.estimate > SNAP
        else DampingStatus.DRIFT if ratio.estimate > DRIFT
        else DampingStatus.STABLE
    )  # fmt: skip
    confidence = 0.0 if status is DampingStatus.UNKNOWN else max(0.0, 1.0 - width / (4.0 * _WIDEST))
    advice = _ADVICE[status]
    return Damping(status, confidence, ratio, raw, modulus, zeta, frequency, advice)


_ADVICE: dict[DampingStatus, tuple[str, ...]] = {
    DampingStatus.CRITICAL: (
        "the updates grow from step to step: halve the learning rate, or roll back and warm it up again",
        "with momentum, lower it or the rate: learning rate times curvature is beyond 2 (1 + beta)",
    ),
    DampingStatus.DRIFT: ("stability is not shown by this window: look at the held-out loss before raising anything",),
    DampingStatus.STABLE: (),
    DampingStatus.UNKNOWN: (),
}


def jerk_ratio(m: Moments) -> float:
    """Root mean square of the jerk over that of the acceleration; nan when the velocity does not change.

    For stationary velocities with one pole rho it is ``sqrt(3 - rho)``: never below sqrt 2.
    """
    return math.sqrt(m.jerk / m.acceleration) if m.acceleration > 1e-12 * m.power and m.jerk >= 0.0 else math.nan


def poles(m: Moments) -> tuple[complex, ...]:
    """The two poles, the one that can be told from noise, or none."""
    determinant = m.v13 * m.v24 - m.v23 * m.v14
    if abs(determinant) > _IDENTIFIED * (abs(m.v13 * m.v24) + abs(m.v23 * m.v14)):
        phi_1 = (m.v03 * m.v24 - m.v23 * m.v04) / determinant
        phi_2 = (m.v13 * m.v04 - m.v03 * m.v14) / determinant
        root = cmath.sqrt(phi_1 * phi_1 + 4.0 * phi_2)
        return (phi_1 + root) / 2.0, (phi_1 - root) / 2.0
    return (complex(m.v02 / m.v12),) if abs(m.v12) > 0.1 * m.power else ()


def second_order(z: tuple[complex, ...]) -> tuple[float, float]:
    """Damping ratio and natural frequency (radians per step) of a pair of discrete poles; nan unless it is a pair.

    ``s = ln z``, ``omega_n^2 = s_1 s_2``, ``zeta = -(s_1 + s_2) / (2 omega_n)``.

    Examples
    --------
    >>> zeta, frequency = second_order((cmath.rect(0.9, 0.5), cmath.rect(0.9, -0.5)))
    >>> round(zeta, 3), round(frequency, 3)
    (0.206, 0.511)
    """
    if len(z) != 2 or not all(abs(pole) > 0.0 for pole in z):
        return math.nan, math.nan
    first, second = (cmath.log(pole) for pole in z)
    # Two real poles on different sides of zero are no oscillator; one below zero alternates at every step.
    square = (first * second).real if abs(z[0] - z[1].conjugate()) < 1e-12 or min(p.real for p in z) > 0 else math.nan
    if not square > 0.0:
        return math.nan, math.nan
    frequency = math.sqrt(square)
    return -(first + second).real / (2.0 * frequency), frequency
