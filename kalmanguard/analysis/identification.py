"""Identification: how noisy are the measurement, the level and the slope? By maximum likelihood."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from kalmanguard.analysis.augmented import Noise, step_noise
from kalmanguard.analysis.series import Series, series
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.autocovariance import Interval
from kalmanguard.records import FloatArray

#: Log variance that stands for zero, in units of the mean squared difference, and the largest log-likelihood that may
#: be lost when a variance is put there: then the values do not tell it from zero.
_ZERO, _LOST = -40.0, 0.01
_NAMES = ("measurement", "level", "slope")


@dataclass(frozen=True, slots=True)
class Identified:
    """Variances of the noise, with intervals.

    Attributes
    ----------
    measurement, level, slope
        Variances with their intervals; ``slope`` is ``None`` in a local level. A variance that zero would explain as
        well has the interval from 0 to nan: there is no curvature to take an upper bound from.
    log_likelihood
        At the maximum, of the values after the first (local level) or the first two (trend), given those.
    converged
        Whether the optimiser came to its end; the likelihood at the estimates is right in either case.
    values
        Number of values.
    """

    measurement: Interval
    level: Interval
    slope: Interval | None
    log_likelihood: float
    converged: bool
    values: int

    @property
    def noise(self) -> Noise:
        """For `kalmanguard.analysis.smoothing.smooth`, which needs a measurement variance that is not quite zero."""
        level, slope = self.level.estimate, None if self.slope is None else self.slope.estimate
        return Noise(max(self.measurement.estimate, 1e-9 * (level + (slope or 0.0))), level, slope)

    def __str__(self) -> str:
        found = [(name, getattr(self, name)) for name in _NAMES]
        parts = [f"{name} {v.estimate:.4g} ({v.low:.4g} to {v.high:.4g})" for name, v in found if v is not None]
        end = "" if self.converged else "; NOT CONVERGED"
        return f"variances: {', '.join(parts)}; log-likelihood {self.log_likelihood:.2f}, {self.values:,} values{end}"


def identify(steps: ArrayLike, values: ArrayLike, *, trend: bool = False, confidence: float = 0.95) -> Identified:
    """Fit the variances of a local level, or of a local linear trend, to a series.

    The model is that of `kalmanguard.analysis.smoothing.smooth`. Steps that are not listed pass all the same.

    Parameters
    ----------
    steps
        Whole numbers, strictly increasing, shape ``(n,)``.
    values
        Shape ``(n,)``; nan where nothing was measured.
    trend
        Whether there is a slope.
    confidence
        Of the intervals.

    Raises
    ------
    ConfigurationError
        Steps and values are no series, hold fewer than 10 values, or values that do not change.

    Notes
    -----
    Assumes Gaussian noise of constant variance: one outlier goes into the measurement variance, one jump into the
    level's. Maximum likelihood by statsmodels on log variances, from several starts. Intervals are Wald's on the log
    scale: ASYMPTOTIC, and too short where a variance is barely told from zero.

    References
    ----------
    Durbin, Koopman, "Time Series Analysis by State Space Methods", 2nd ed. 2012, section 7.3.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> steps = np.arange(300)
    >>> values = np.cumsum(0.5 * rng.normal(size=300)) + rng.normal(size=300)
    >>> print(identify(steps, values))
    variances: measurement 1.004 (0.7954 to 1.268), level 0.3448 (0.217 to 0.5478); log-likelihood -511.47,
    300 values
    """
    if not 0.0 < confidence < 1.0:
        raise ConfigurationError(f"confidence = {confidence!r} must be between 0 and 1, such as 0.95.")
    data = series(steps, values, least=10).known()
    differences = np.diff(data.values)
    typical = float(np.mean(differences**2))
    if not typical > (1e-12 * float(np.abs(data.values).max())) ** 2:
        raise ConfigurationError("The values do not change: there is no noise to identify.")
    scale = math.sqrt(typical)
    scaled = Series(data.steps, (data.values - data.values[0]) / scale)
    model = _model(scaled, trend)
    with warnings.catch_warnings():
        # Of the optimiser, while it explores; whether it converged is a field of the result.
        warnings.simplefilter("ignore")
        fits = [model.fit(start, method="lbfgs", maxiter=200, disp=0, cov_type="none") for start in _starts(trend)]
        best = max(fits, key=lambda fit: float(fit.llf))
        logs = _with_zeros(model, np.asarray(best.params, dtype=np.float64), float(best.llf))
        errors = _errors(model, logs)
    from scipy.special import ndtri

    deviations = float(ndtri(0.5 + confidence / 2.0))
    intervals = [_interval(log, error, typical, deviations) for log, error in zip(logs, errors, strict=True)]
    judged = len(data.values) - (2 if trend else 1)
    return Identified(
        measurement=intervals[0],
        level=intervals[1],
        slope=intervals[2] if trend else None,
        log_likelihood=float(best.llf_obs[-judged:].sum()) - judged * math.log(scale),
        converged=bool(best.mle_retvals["converged"]),
        values=len(data.values),
    )


def _starts(trend: bool) -> list[FloatArray]:
    """Log variances in units of the mean squared difference: mostly measurement noise, and mostly movement."""
    if trend:
        return [np.log([0.5, 0.01, 1e-4]), np.log([0.1, 0.1, 0.05]), np.log([0.3, 0.3, 1e-6])]
    return [np.log([0.45, 0.05]), np.log([0.05, 0.8])]


def _with_zeros(model: Any, logs: FloatArray, top: float) -> FloatArray:
    """Put variances at zero that are small and that the likelihood does not miss."""
    for at in np.flatnonzero(logs < math.log(0.01)):
        without = logs.copy()
        without[at] = _ZERO
        if float(model.loglike(without)) > top - _LOST:
            logs = without
    return logs


def _errors(model: Any, logs: FloatArray) -> FloatArray:
    """Standard errors of the log variances that are not at zero, with the others held there; nan where unknown."""
    errors = np.full(len(logs), math.nan)
    free = logs > _ZERO
    curvature = -model.nobs * np.asarray(model.hessian(logs, method="approx"))[np.ix_(free, free)]
    if free.any() and np.isfinite(curvature).all() and np.linalg.eigvalsh(curvature).min() > 0.0:
        errors[free] = np.sqrt(np.diag(np.linalg.inv(curvature)))
    return errors


def _interval(log: float, error: float, typical: float, deviations: float) -> Interval:
    variance = typical * math.exp(log)
    if log <= _ZERO:
        return Interval(0.0, 0.0, math.nan)
    if not math.isfinite(error):
        return Interval(variance, 0.0, math.nan)
    factor = math.exp(min(deviations * error, 300.0))
    return Interval(variance, variance / factor, variance * factor)


def _model(data: Series, trend: bool) -> Any:
    """The state-space model in statsmodels, its transition and its noise as long as the gaps are."""
    from statsmodels.tsa.statespace.mlemodel import MLEModel

    gaps = np.diff(data.steps, append=data.steps[-1] + 1).astype(np.float64)
    d = 2 if trend else 1
    # Noise of a gap is linear in the two variances.
    parts = np.zeros((2, d, d, len(gaps)))
    for row, gap in enumerate(gaps.tolist()):
        for part, noise in enumerate((Noise(0.0, 1.0), Noise(0.0, 0.0, 1.0))):
            p = step_noise(noise, gap)
            parts[part, :, :, row] = np.array([[p.level, p.cross], [p.cross, p.slope]])[:d, :d]

    class Trend(MLEModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(data.values, k_states=d, k_posdef=d, initialization="diffuse")
            self["design", 0, 0] = 1.0
            self["selection"] = np.eye(d)
            self["transition"] = np.tile(np.eye(d)[:, :, None], len(gaps))
            if trend:
                self["transition", 0, 1, :] = gaps

        @property
        def param_names(self) -> list[str]:
            return [f"log {name}" for name in _NAMES[: d + 1]]

        @property
        def start_params(self) -> FloatArray:
            return _starts(trend)[0]

        def update(self, params: FloatArray, **kwargs: Any) -> None:
            variances = np.exp(np.clip(super().update(params, **kwargs), _ZERO, -_ZERO))
            self["obs_cov", 0, 0] = variances[0]
            self["state_cov"] = np.tensordot(variances[1:], parts[:d], axes=1)

    return Trend()
