"""The bound: how well damping ratio and natural frequency can be known at all, from n steps under noise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kalmanguard.analysis.noisy_autoregression import NoisyAutoregression, information
from kalmanguard.analysis.second_order import Pair
from kalmanguard.errors import ConfigurationError


class Bound(NamedTuple):
    """Smallest standard deviations of unbiased estimates of zeta and of omega_n (radians per step)."""

    damping: float
    frequency: float


def cramer_rao(damping: float, frequency: float, *, n: int, snr: float, columns: float = 1.0) -> Bound:
    """Cramer-Rao bound of zeta and omega_n when the power and the noise are unknown as well.

    Parameters
    ----------
    damping, frequency
        zeta in (0, 1), and omega_n in radians per step.
    n
        Number of steps.
    snr
        Power of the oscillation over the variance of the measurement noise (10 is 10 dB).
    columns
        Number of independent columns that share the poles.

    Raises
    ------
    ConfigurationError
        The poles are no pair, or a size is not positive.

    Notes
    -----
    Assumes an oscillation that white noise drives, Gaussian, under white measurement noise. ASYMPTOTIC: the information
    is n times its limit, which is right when n holds many decay times, ``n zeta omega_n >> 1``.

    References
    ----------
    Whittle, Arkiv foer Matematik 2 (1953); Kay, "Fundamentals of Statistical Signal Processing" I, 1993, chapter 3.

    Examples
    --------
    >>> bound = cramer_rao(0.1, 0.5, n=1000, snr=10.0)
    >>> round(bound.damping, 4), round(bound.frequency, 4)
    (0.0172, 0.0078)
    """
    if n < 1 or not snr > 0.0 or not columns > 0.0:
        raise ConfigurationError(f"n = {n!r}, snr = {snr!r} and columns = {columns!r} must be positive.")
    pair = Pair.of(damping, frequency)
    power = NoisyAutoregression(*pair.coefficients(), 0.0).variances()[0]
    return bound(pair, power / snr, n * columns)


def bound(pair: Pair, ratio: float, count: float) -> Bound:
    """The same for a ratio of measurement noise to driving noise and a number of independent values."""
    jacobian = np.eye(3)
    jacobian[:2, :2] = pair.slopes()
    matrix = jacobian.T @ information(NoisyAutoregression(*pair.coefficients(), ratio)) @ jacobian
    slopes = pair.damping_slopes()
    covariance = slopes @ np.linalg.inv(matrix)[:2, :2] @ slopes.T / count
    return Bound(float(np.sqrt(covariance[0, 0])), float(np.sqrt(covariance[1, 1])))
