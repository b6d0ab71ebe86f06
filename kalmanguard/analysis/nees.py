"""NEES: are a filter's errors, where the truth is known, as large as it says?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from kalmanguard.analysis.checks import Check, size
from kalmanguard.errors import ConfigurationError
from kalmanguard.records import Guarantee


def nees(errors: ArrayLike, covariances: ArrayLike, *, confidence: float = 0.95) -> Check:
    """Judge a filter by its errors against the truth: the mean of ``e' P^-1 e``, over the dimension of e.

    Parameters
    ----------
    errors
        Estimate less truth, shape ``(n, d)``; rows must be independent: runs, or steps of one run so far apart that the
        filter has forgotten in between.
    covariances
        As the filter states them, positive definite, shape ``(n, d, d)``.
    confidence
        That a consistent filter passes.

    Raises
    ------
    ConfigurationError
        Shapes do not fit, a value is not finite, or a covariance is not positive definite.

    Notes
    -----
    EXACT for Gaussian errors in independent rows; errors at neighbouring steps are correlated, and then the interval is
    too narrow.

    References
    ----------
    Bar-Shalom, Li, Kirubarajan, "Estimation with Applications to Tracking and Navigation", 2001, section 5.4.2.

    Examples
    --------
    >>> errors = np.random.default_rng(0).normal(size=(100, 2))
    >>> print(nees(errors, np.tile(4.0 * np.eye(2), (100, 1, 1))))
    NEES 0.231, 0.814 to 1.21 expected (p = 6e-32): underconfident
    """
    try:
        e, p = np.asarray(errors, dtype=np.float64), np.asarray(covariances, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"Errors and covariances must be numbers: {error}.") from None
    if e.ndim != 2 or e.size == 0 or p.shape != (*e.shape, e.shape[1]):
        raise ConfigurationError(f"Errors {e.shape} must be (n, d), and covariances {p.shape} (n, d, d).")
    if not np.isfinite(e).all() or not np.isfinite(p).all():
        raise ConfigurationError("Errors and covariances must be finite: leave out what is not.")
    if not 0.0 < confidence < 1.0:
        raise ConfigurationError(f"confidence = {confidence!r} must be between 0 and 1, such as 0.95.")
    try:
        whitened = np.linalg.solve(np.linalg.cholesky(p), e[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:
        raise ConfigurationError("A covariance is not positive definite: it describes no error.") from None
    return size("NEES", float((whitened**2).mean()), float(e.size), 1.0 - confidence, Guarantee.EXACT)
