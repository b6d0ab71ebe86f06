"""Estimators of damping and frequency from one series of positions, by name."""

from __future__ import annotations

import cmath
import math
import warnings
from collections.abc import Callable

import numpy as np

from kalmanguard.analysis.study.detectors import blocks_of
from kalmanguard.analysis.study.linear import pole_damping
from kalmanguard.detectors.damping import poles
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.autocovariance import total
from kalmanguard.records import FloatArray

#: Values ``(n,)`` to damping ratio and natural frequency in radians per step; nan where nothing is identified.
Estimator = Callable[[FloatArray], tuple[float, float]]


def oscillator(zeta: float, frequency: float, *, steps: int, snr: float, seed: int) -> FloatArray:
    """A noise-driven second-order process with that pair of poles, read with white noise.

    Parameters
    ----------
    zeta, frequency
        Damping ratio in (0, 1), and natural frequency in radians per step.
    steps
        Length of the series, after 1,000 steps that are not shown.
    snr
        Variance of the process over that of the reading noise; infinite for none.

    Raises
    ------
    ConfigurationError
        The damping ratio is that of no oscillator.
    """
    if not 0.0 < zeta < 1.0:
        raise ConfigurationError(f"zeta = {zeta} must lie between 0 and 1 for a pair of stable complex poles.")
    z = cmath.exp(frequency * complex(-zeta, math.sqrt(1.0 - zeta * zeta)))
    phi_1, phi_2 = 2.0 * z.real, -(abs(z) ** 2)
    rng = np.random.default_rng(seed)
    x = np.zeros(steps + 1000)
    noise = rng.normal(size=len(x))
    for t in range(2, len(x)):
        x[t] = phi_1 * x[t - 1] + phi_2 * x[t - 2] + noise[t]
    shown: FloatArray = x[1000:]
    variance = (1.0 - phi_2) / ((1.0 + phi_2) * ((1.0 - phi_2) ** 2 - phi_1**2))
    return shown + rng.normal(size=steps) * math.sqrt(variance / snr)


def least_squares(values: FloatArray) -> tuple[float, float]:
    """Regress ``x_t`` on ``x_{t-1}`` and ``x_{t-2}``; reading noise biases it towards overdamped."""
    lags = np.column_stack([values[1:-1], values[:-2]])
    phi, *_ = np.linalg.lstsq(lags, values[2:], rcond=None)
    return _of_coefficients(float(phi[0]), float(phi[1]))


def burg(values: FloatArray) -> tuple[float, float]:
    """Burg's recursion: always stable, and as biased by reading noise as least squares."""
    from statsmodels.regression.linear_model import burg as recursion

    phi, _ = recursion(values, order=2, demean=False)
    return _of_coefficients(float(phi[0]), float(phi[1]))


def instruments(values: FloatArray) -> tuple[float, float]:
    """What the supervisor uses (`kalmanguard.detectors.damping.poles`): lags 3 and 4 as instruments."""
    blocks = blocks_of(values[:, None])
    found = poles(total(blocks)) if blocks else ()
    return pole_damping(max(found, key=abs)) if found else (math.nan, math.nan)


def maximum_likelihood(values: FloatArray) -> tuple[float, float]:
    """Second-order process with reading noise by maximum likelihood, started from the instruments."""
    from statsmodels.tools.sm_exceptions import ConvergenceWarning
    from statsmodels.tsa.statespace.sarimax import SARIMAX

    zeta, frequency = instruments(values)
    if not 0.0 < zeta < 1.0:
        zeta, frequency = 0.5, 0.5
    z = cmath.exp(frequency * complex(-zeta, math.sqrt(1.0 - zeta * zeta)))
    unit = values / values.std()
    model = SARIMAX(unit, order=(2, 0, 0), measurement_error=True)
    start = {"ar.L1": 2.0 * z.real, "ar.L2": -(abs(z) ** 2), "var.measurement_error": 0.1, "sigma2": 0.1}
    with warnings.catch_warnings():
        # An optimizer that stops early is one more estimate; its spread is what the study shows.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = model.fit([start[name] for name in model.param_names], disp=False, maxiter=100)
    found = dict(zip(model.param_names, fit.params, strict=True))
    return _of_coefficients(float(found["ar.L1"]), float(found["ar.L2"]))


#: All that are compared. An estimator of one's own is added here, and nowhere else.
ESTIMATORS: dict[str, Estimator] = {
    "least squares": least_squares,
    "Burg": burg,
    "instruments": instruments,
    "maximum likelihood": maximum_likelihood,
}


def _of_coefficients(phi_1: float, phi_2: float) -> tuple[float, float]:
    root = cmath.sqrt(phi_1 * phi_1 + 4.0 * phi_2)
    return pole_damping(max((phi_1 + root) / 2.0, (phi_1 - root) / 2.0, key=abs))
