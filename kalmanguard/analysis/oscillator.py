"""Damping ratio and natural frequency of a noisy oscillation, with intervals, by exact maximum likelihood."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from kalmanguard.analysis.cramer_rao import bound
from kalmanguard.analysis.likelihood_climb import (
    Peak,
    climb,
    coordinates_of,
    oscillating,
    overdamped,
    pair_of,
)
from kalmanguard.analysis.noisy_autoregression import log_likelihood
from kalmanguard.analysis.oscillation import Oscillation
from kalmanguard.analysis.second_order import Pair
from kalmanguard.analysis.yule_walker import autocovariances, poles_of
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.autocovariance import Interval
from kalmanguard.records import FloatArray

#: Divided by the number of places where a resonance as wide could stand, the chance that its evidence is asked for.
_CHANCE = 0.2
#: Fewest steps.
_LEAST = 32
#: Where the climb to the best real poles may start, as inverse hyperbolic tangents.
_REAL = [(0.5, 0.3), (1.5, 0.3), (1.5, 1.2), (2.5, 0.0), (2.5, 2.0), (1.0, -1.0), (-0.5, -0.3), (-2.0, -0.3)]
_NOTHING = Interval(math.nan, -math.inf, math.inf)


def oscillator(values: ArrayLike, *, confidence: float = 0.95, rank: float | None = None) -> Oscillation:
    """Estimate the damping ratio and the natural frequency of a second-order process under white measurement noise.

    ``x_t = phi_1 x_{t-1} + phi_2 x_{t-2} + e_t``, ``y_t = x_t + v_t``, with poles ``exp(omega_n (-zeta +- i sqrt(1 -
    zeta^2)))``.

    Parameters
    ----------
    values
        Steps in a row, shape ``(n,)``, or ``(n, k)`` for columns that share the poles and the signal-to-noise ratio,
        each at a scale of its own; finite, n at least 32. Their means are subtracted.
    confidence
        Of the intervals.
    rank
        Number of independent columns that k correlated ones are worth, k by default; it widens the intervals, and
        weighs the evidence.

    Raises
    ------
    ConfigurationError
        Too few values, some that are not finite, a column that does not change, or arguments out of range.

    Notes
    -----
    Assumes a stationary process of second order that white noise drives. A trend, a decay from a large start
    (`kalmanguard.analysis.free_decay`) or a third pole bias the estimates; poles outside the unit circle are not looked
    for. The exact Gaussian likelihood is maximised by Fisher scoring from the best of several starts (modified
    Yule-Walker, largest line of the periodogram). Intervals are Wald's with the expected information, for zeta on the
    scale of its square root, on which its variance hardly depends on zeta. Guarantee of the intervals: ASYMPTOTIC, for
    n that holds many decay times; of ``identified``: HEURISTIC, ``2 log(m / 0.2)`` for the m places where a resonance
    as wide as the one found could stand. What both are worth in simulation: ``python -m benchmarks oscillator``.

    References
    ----------
    Durbin, Koopman, "Time Series Analysis by State Space Methods", 2nd ed. 2012, chapter 7; Stoica, Moses, "Spectral
    Analysis of Signals", 2005, section 3.7.

    Examples
    --------
    >>> from scipy.signal import lfilter
    >>> rng = np.random.default_rng(0)
    >>> phi = Pair.of(0.1, 0.5).coefficients()
    >>> x = lfilter([1.0], [1.0, -phi[0], -phi[1]], rng.normal(size=1200))[200:]
    >>> print(oscillator(x + rng.normal(size=1000)))
    damping ratio 0.133 (0.0964 to 0.176), natural frequency 0.4972 (0.48 to 0.5143) radians per step,
    signal to noise 18.5
    >>> print(oscillator(rng.normal(size=1000)))
    no oscillation identified: twice the log-likelihood ratio over real poles is 3.2, and 16.2 are needed
    """
    columns = _columns(values)
    n, k = columns.shape
    if not 0.0 < confidence < 1.0:
        raise ConfigurationError(f"confidence = {confidence!r} must be between 0 and 1, such as 0.95.")
    if rank is not None and not 1.0 <= rank <= k:
        raise ConfigurationError(f"rank = {rank!r} must be from 1 to the number of columns, {k}.")
    worth = 1.0 if rank is None else rank / k
    scaled = columns / columns.std(0)
    peak, real = _pair(scaled), _real(scaled)
    # Back to the scale of the values.
    logarithms = n * float(np.log(columns.std(0)).sum())
    evidence = 2.0 * worth * (peak.log_likelihood - real.log_likelihood)
    pair, ratio = pair_of(peak.coordinates)
    needed = 2.0 * math.log(math.pi / (pair.decay * _CHANCE))
    identified = evidence > needed
    best, family = (peak, oscillating) if identified else (real, overdamped)
    model = family(best.coordinates)[0]
    zeta = omega = _NOTHING
    if identified:
        zeta, omega = _intervals(pair, ratio, n * k * worth, confidence)
    return Oscillation(
        identified=identified,
        damping=zeta,
        frequency=omega,
        snr=model.variances()[0] / model.ratio,
        evidence=evidence,
        needed=needed,
        log_likelihood=best.log_likelihood - logarithms,
        converged=best.converged,
        values=columns,
        model=model,
    )


def _columns(values: ArrayLike) -> FloatArray:
    try:
        given = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"Values must be numbers: {error}.") from None
    if given.ndim not in (1, 2) or len(given) < _LEAST or given.size == 0:
        raise ConfigurationError(f"Values of shape {given.shape} must be (n,) or (n, k) with n at least {_LEAST}.")
    if not np.isfinite(given).all():
        raise ConfigurationError("A value is not finite: cut the series there, since steps must be in a row.")
    columns = given.reshape(len(given), -1)
    centred: FloatArray = columns - columns.mean(0)
    if not (centred.std(0) > 1e-12 * np.abs(columns).max(0)).all():
        raise ConfigurationError("A column does not change: leave it out.")
    return centred


def _box(n: int) -> tuple[FloatArray, FloatArray]:
    """Bounds of the coordinates of `oscillating`: what a window of n steps can show at all."""
    return np.array([math.log(0.05 / n), -math.log(math.pi * n), -14.0]), np.array([1.6, math.log(1e3), 14.0])


def _pair(values: FloatArray) -> Peak:
    """The best conjugate pair, from the best of some starts."""
    n = len(values)
    low, high = _box(n)
    c = autocovariances(values, min(n // 4, 32))
    poles = [z for z, _ in (poles_of(c[: m + 1]) for m in (4, 8, 16, 32) if m < len(c)) if abs(z.imag) > 1e-9]
    pairs = [Pair(max(-math.log(abs(z)), 1e-3), abs(float(np.angle(z)))) for z in poles]
    power = (np.abs(np.fft.rfft(values, axis=0)) ** 2).sum(1)[1:-1]
    line = 2.0 * math.pi * (int(power.argmax()) + 1) / n
    pairs += [Pair(decay, line) for decay in (0.01, 0.05, 0.3)]
    starts = [coordinates_of(pair, ratio * pair.decay) for pair in pairs for ratio in (0.3, 5.0)]
    clipped: list[FloatArray] = [np.clip(start, low, high) for start in starts]
    best = max(clipped, key=lambda u: log_likelihood(oscillating(u)[0], values))
    return climb(oscillating, best, low, high, values)


def _real(values: FloatArray) -> Peak:
    """The best two real poles; one pole and none are among them."""
    n = len(values)
    edge = math.atanh(1.0 - 0.05 / n)
    low, high = np.array([-edge, -edge, -14.0]), np.array([edge, edge, 14.0])
    starts = [np.array([one, other, 0.0]) for one, other in _REAL]
    best = max(starts, key=lambda u: log_likelihood(overdamped(u)[0], values))
    return climb(overdamped, best, low, high, values)


def _intervals(pair: Pair, ratio: float, count: float, confidence: float) -> tuple[Interval, Interval]:
    from scipy.special import ndtri

    deviations = float(ndtri(0.5 + confidence / 2.0))
    error = bound(pair, ratio, count)
    zeta, omega = pair.damping, pair.frequency
    half = deviations * error.damping / (2.0 * math.sqrt(zeta))
    around = deviations * error.frequency
    return (
        Interval(zeta, max(math.sqrt(zeta) - half, 0.0) ** 2, (math.sqrt(zeta) + half) ** 2),
        Interval(omega, max(omega - around, 0.0), omega + around),
    )
