"""Modified Yule-Walker equations: poles from lags that white measurement noise does not reach."""

from __future__ import annotations

import numpy as np

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray


def autocovariances(values: FloatArray, lags: int) -> FloatArray:
    """``c_h = sum_t v_t . v_{t-h} / n`` for h = 0 to lags; columns of shape ``(n, k)`` are added."""
    n = len(values)
    return np.array([float((values[h:] * values[: n - h]).sum()) for h in range(lags + 1)]) / n


def modified_yule_walker(values: FloatArray, *, last_lag: int = 8) -> tuple[complex, complex]:
    """Poles of a second-order process under white measurement noise.

    ``c_h = phi_1 c_{h-1} + phi_2 c_{h-2}`` for h = 3 to ``last_lag``, by least squares: none of these lags holds the
    noise's variance, which makes the equations for h = 1 and 2 call everything overdamped.

    Parameters
    ----------
    values
        Shape ``(n,)`` or ``(n, k)``, finite, mean 0.
    last_lag
        At least 4. More lags help where the oscillation is slow.

    Raises
    ------
    ConfigurationError
        There are not enough values for the lags.

    Notes
    -----
    ASYMPTOTIC: consistent, not efficient; where the lags hold little, the poles are arbitrary, outside the unit circle
    even. A start for `kalmanguard.analysis.oscillator`, which is efficient and has intervals.

    References
    ----------
    Stoica, Soederstroem, Friedlander, IEEE Trans. Automatic Control 30 (1985).

    Examples
    --------
    >>> steps = np.arange(400)
    >>> first, second = modified_yule_walker(np.cos(0.5 * steps))
    >>> round(abs(first), 2), round(abs(float(np.angle(first))), 2)
    (1.0, 0.5)
    """
    columns = values.reshape(len(values), -1)
    if not 4 <= last_lag < len(columns):
        raise ConfigurationError(f"last_lag = {last_lag!r} must be from 4 to {len(columns) - 1}, below the length.")
    c = autocovariances(columns, last_lag)
    return poles_of(c)


def poles_of(c: FloatArray) -> tuple[complex, complex]:
    """The same, from autocovariances at lags 0 to ``len(c) - 1``."""
    phi = np.linalg.lstsq(np.stack([c[2:-1], c[1:-2]], axis=1), c[3:], rcond=None)[0]
    first, second = (complex(z) for z in np.roots([1.0, -phi[0], -phi[1]]))
    return first, second
