"""Exact likelihood of a second-order autoregression under white measurement noise, and its Fisher information."""

from __future__ import annotations

import cmath
import math
from typing import NamedTuple

import numpy as np

from kalmanguard.records import FloatArray

#: Responses to the unknown start below this share of their first are left out: rounding hides them.
_FORGOTTEN = 1e-17
#: Points of the integral per decay of the slowest pole, and the most of them.
_POINTS, _MOST = 40.0, 1 << 15


class NoisyAutoregression(NamedTuple):
    """``x_t = phi_1 x_{t-1} + phi_2 x_{t-2} + e_t`` and ``y_t = x_t + v_t``, both noises white.

    ``ratio`` is the variance of v over that of e. Stationary: both poles inside the unit circle.
    """

    phi_1: float
    phi_2: float
    ratio: float

    def variances(self) -> tuple[float, float]:
        """Variance of x and its covariance with the value before, in units of the variance of e."""
        f, s = self.phi_1, self.phi_2
        variance = (1.0 - s) / ((1.0 + s) * ((1.0 - s) ** 2 - f * f))
        return variance, variance * f / (1.0 - s)

    def moving_average(self) -> tuple[float, float, float]:
        """``theta_1``, ``theta_2`` and the variance of the innovations ``u`` in the equivalent ARMA(2, 2).

        ``s2 |1 + theta_1 z + theta_2 z^2|^2 = 1 + ratio |1 - phi_1 z - phi_2 z^2|^2`` on the unit circle, solved in
        closed form through ``1 / (z + 1/z)``.
        """
        f, s, r = self
        c0, c1, c2 = 1.0 + r * (1.0 + f * f + s * s), r * (f * s - f), -r * s
        root = cmath.sqrt(c1 * c1 - 4.0 * c2 * (c0 - 2.0 * c2))
        q = -(c1 + (root if c1 * root.real >= 0.0 else -root)) / 2.0
        zeros = [2.0 * v / (1.0 + cmath.sqrt(1.0 - 4.0 * v * v)) for v in (c2 / q if q else 0.0, q / (c0 - 2.0 * c2))]
        theta_1, theta_2 = -(zeros[0] + zeros[1]).real, (zeros[0] * zeros[1]).real
        return theta_1, theta_2, c0 / (1.0 + theta_1 * theta_1 + theta_2 * theta_2)


def log_likelihood(model: NoisyAutoregression, values: FloatArray) -> float:
    """Gaussian log-likelihood of columns that share the model, each at the scale that suits it best.

    Parameters
    ----------
    model
        Stationary.
    values
        Shape ``(n, k)``, finite, mean 0.

    Notes
    -----
    The innovations of the stationary filter, ``theta(B) u = phi(B) y``, started from a state f of zero; the true one
    enters linearly, ``u = u_0 - C f``, and is integrated out under its stationary distribution. EXACT, as from a Kalman
    filter with the stationary start. Cost: one linear filter over the values.
    """
    from scipy.signal import lfilter

    n, k = values.shape
    f, s, r = model
    theta_1, theta_2, s2 = model.moving_average()
    u = lfilter([1.0, -f, -s], [1.0, theta_1, theta_2], values, axis=0)
    # State: the predictions of y_t and y_{t+1}. Its stationary covariance is that of y less that of their errors.
    psi = f + theta_1
    variance, neighbour = model.variances()
    d0, d1, d2 = variance + r - s2, neighbour - psi * s2, variance + r - s2 * (1.0 + psi * psi)
    radius = max(abs(theta_2) ** 0.5, abs(theta_1))
    length = n if radius >= 1.0 else min(n, 4 + int(math.log(_FORGOTTEN) / math.log(max(radius, 1e-9))))
    start = np.zeros((length, 2))
    start[0, 0], start[1] = 1.0, (-f, 1.0)
    c = lfilter([1.0], [1.0, theta_1, theta_2], start, axis=0)
    b = c.T @ u[:length]
    m = c.T @ c
    # Woodbury, with 2 x 2 matrices written out: W = s2 + D M.
    w00, w01 = s2 + d0 * m[0, 0] + d1 * m[0, 1], d0 * m[0, 1] + d1 * m[1, 1]
    w10, w11 = d1 * m[0, 0] + d2 * m[0, 1], s2 + d1 * m[0, 1] + d2 * m[1, 1]
    determinant = w00 * w11 - w01 * w10
    p0, p1 = d0 * b[0] + d1 * b[1], d1 * b[0] + d2 * b[1]
    explained = (b[0] * (w11 * p0 - w01 * p1) + b[1] * (w00 * p1 - w10 * p0)) / determinant
    squares = (np.einsum("tk,tk->k", u, u) - explained) / s2
    if not determinant > 0.0 or not (squares > 0.0).all():
        return -math.inf
    log_determinant = (n - 2) * math.log(s2) + math.log(determinant)
    scales = float(np.log(squares / n).sum())
    return float(-0.5 * (k * log_determinant + n * scales + n * k * (1.0 + math.log(2.0 * math.pi))))


def information(model: NoisyAutoregression) -> FloatArray:
    """Fisher information of (phi_1, phi_2, log ratio) per value, when the scale is unknown as well; shape ``(3, 3)``.

    ``1 / (4 pi)`` times the integral over frequencies of ``(d log f)(d log f)'`` for the spectral density f, less what
    the unknown scale takes: Whittle's formula, the limit of the exact information over n. On a smooth periodic function
    equally spaced points converge geometrically.
    """
    from scipy.special import expit

    radius = max(abs(root) for root in np.roots([1.0, -model.phi_1, -model.phi_2]))
    points = min(_MOST, max(512, math.ceil(-_POINTS / math.log(radius)) if 0.0 < radius < 1.0 else 512))
    z = np.exp(-1j * (np.arange(points // 2) + 0.5) * (2.0 * math.pi / points))
    phi = 1.0 - z * (model.phi_1 + model.phi_2 * z)
    signal = expit(-math.log(model.ratio) - 2.0 * np.log(np.abs(phi)))  # share of the density that is not noise
    turned = 2.0 * z / phi
    slopes = np.stack([signal * turned.real, signal * (turned * z).real, 1.0 - signal])
    slopes -= slopes.mean(1, keepdims=True)
    matrix: FloatArray = 0.5 * (slopes @ slopes.T) / slopes.shape[1]
    return matrix
