"""Free decay: poles of a transient by the matrix pencil, when nothing drives it any more."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kalmanguard.errors import ConfigurationError


def free_decay(values: ArrayLike, *, order: int = 2) -> NDArray[np.complex128]:
    """Find the poles of a sum of decaying exponentials, ``y_t = sum_i a_i z_i^t`` and noise.

    Of the two matrices of shifted windows, one is the other times the poles, on the subspace that the ``order`` largest
    singular values span.

    Parameters
    ----------
    values
        Steps in a row, finite, shape ``(n,)`` or ``(n, k)`` for columns that share the poles.
    order
        Number of poles; an oscillation has 2.

    Returns
    -------
    array
        Shape ``(order,)``, the largest modulus first, the positive angle of a pair first;
        `kalmanguard.detectors.damping.second_order` makes zeta and omega_n of a pair.

    Raises
    ------
    ConfigurationError
        The values are not finite, all zero, or fewer than ``3 order + 3``.

    Notes
    -----
    Without noise EXACT to rounding. With white noise it is biased little and comes near the Cramer-Rao bound while the
    noise stays well below the transient; it has no interval. For a process that noise drives on and on it is the wrong
    model: `kalmanguard.analysis.oscillator`. Cost: a singular value decomposition of (n/3) by (2n/3) numbers a column.

    References
    ----------
    Hua, Sarkar, IEEE Trans. Acoustics, Speech, Signal Processing 38 (1990).

    Examples
    --------
    >>> import cmath
    >>> steps = np.arange(60)
    >>> poles = free_decay(3.0 * 0.95**steps * np.cos(0.4 * steps + 1.0))
    >>> [round(float(abs(z)), 6) for z in poles], round(cmath.phase(poles[0]), 6)
    ([0.95, 0.95], 0.4)
    """
    try:
        given = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"Values must be numbers: {error}.") from None
    if given.ndim not in (1, 2) or order < 1 or len(given) < 3 * order + 3:
        raise ConfigurationError(
            f"Values of shape {given.shape} must be (n,) or (n, k), with n at least {3 * order + 3} for {order} poles."
        )
    if not np.isfinite(given).all() or not given.any():
        raise ConfigurationError("The values must be finite and not all zero: cut the series to the decay.")
    columns = given.reshape(len(given), -1)
    width = len(columns) // 3 + 1
    windows = np.concatenate([np.lib.stride_tricks.sliding_window_view(c, width) for c in columns.T])
    basis = np.linalg.svd(windows, full_matrices=False)[2][:order].T
    shift = np.linalg.lstsq(basis[:-1], basis[1:], rcond=None)[0]
    poles = np.asarray(np.linalg.eigvals(shift), dtype=np.complex128)
    return poles[np.lexsort((-poles.imag, -np.abs(poles).round(12)))]
