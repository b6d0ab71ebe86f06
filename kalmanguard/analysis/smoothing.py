"""Smoothing: what a series was at every step, given all of it; Kalman smoother of a local level or trend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kalmanguard.analysis.augmented import Noise, backward, forward, predictions
from kalmanguard.analysis.drawing import BLUE, axes_or_new
from kalmanguard.analysis.series import series
from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True, eq=False)
class Smoothed:
    """A smoothed series; all arrays have shape ``(n,)``.

    Attributes
    ----------
    steps, values
        As given.
    noise
        The variances that were used.
    level, slope
        Smoothed means; the slope is per step, and 0 in a local level.
    level_sd, slope_sd
        Their standard deviations, given the noise.
    innovations, innovation_variances
        One-step-ahead, from the past alone; nan where there is no value, and for the first value (local level) or two
        (trend), which nothing predicts.
    log_likelihood
        Of the values that are predicted, given those first ones: the diffuse likelihood without its constant.
    """

    steps: NDArray[np.int64]
    values: FloatArray
    noise: Noise
    level: FloatArray
    slope: FloatArray
    level_sd: FloatArray
    slope_sd: FloatArray
    innovations: FloatArray
    innovation_variances: FloatArray
    log_likelihood: float

    def band(self, confidence: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Lower and upper bound of the level at each step, by the normal distribution."""
        from scipy.special import ndtri

        if not 0.0 < confidence < 1.0:
            raise ConfigurationError(f"confidence = {confidence!r} must be between 0 and 1, such as 0.95.")
        half = float(ndtri(0.5 + confidence / 2.0)) * self.level_sd
        return self.level - half, self.level + half

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw values, level and its 95 % band; returns the axes."""
        axes = axes_or_new(axes)
        low, high = self.band()
        axes.plot(self.steps, self.values, ".", markersize=3, color="0.6", label="measured")
        axes.plot(self.steps, self.level, color=BLUE, label="smoothed")
        axes.fill_between(self.steps, low, high, color=BLUE, alpha=0.2, linewidth=0, label="95 %")
        axes.set_xlabel("step")
        axes.legend()
        return axes

    def __str__(self) -> str:
        seen = int((~np.isnan(self.values)).sum())
        return (
            f"{seen:,} values over steps {self.steps[0]:,} to {self.steps[-1]:,}: level {self.level[-1]:.6g} +- "
            f"{self.level_sd[-1]:.2g} at the end, slope {self.slope[-1]:.3g} +- {self.slope_sd[-1]:.2g} per step, "
            f"log-likelihood {self.log_likelihood:.2f}"
        )


def smooth(steps: ArrayLike, values: ArrayLike, noise: Noise) -> Smoothed:
    """Estimate level and slope at every step from all values, before and after it.

    ::

        level_{t+1} = level_t + slope_t + N(0, noise.level)
        slope_{t+1} = slope_t           + N(0, noise.slope)
        value_t     = level_t           + N(0, noise.measurement)

    Steps that are not listed pass all the same, d of them at once with the sum of their noise.

    Parameters
    ----------
    steps
        Whole numbers, strictly increasing, shape ``(n,)``.
    values
        Shape ``(n,)``; nan where nothing was measured but an estimate is wanted.
    noise
        Variances, in the square of the values' unit; `kalmanguard.analysis.identification` finds them.

    Raises
    ------
    ConfigurationError
        A variance is negative or that of the measurement is not positive, or there are fewer values than the two (local
        level) or three (trend) that leave something to be judged.

    Notes
    -----
    Assumes that the noise is independent and its variances are right: with too small ones for level and slope the
    bands are too narrow and the level lags (`kalmanguard.analysis.consistency` tells). The start is diffuse, exactly:
    the filter runs from an unknown level and slope in which everything is linear, and they are solved for by
    generalised least squares. Estimates are best linear, and bands EXACT for Gaussian noise of known variances;
    variances that were fitted to the same series make the bands a little narrow. Cost: two passes over the rows.

    References
    ----------
    Durbin, Koopman, "Time Series Analysis by State Space Methods", 2nd ed. 2012, sections 4.4 (smoother) and 5.7
    (augmented filter); de Jong, Annals of Statistics 19 (1991).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> steps = np.arange(200)
    >>> smoothed = smooth(steps, 3.0 - 0.01 * steps + 0.1 * rng.normal(size=200), Noise(0.01, 0.0, 0.0))
    >>> print(smoothed)
    200 values over steps 0 to 199: level 1.00165 +- 0.014 at the end, slope -0.0101 +- 0.00012 per step,
    log-likelihood 172.55
    """
    if not (math.isfinite(noise.measurement) and noise.measurement > 0.0):
        raise ConfigurationError(f"Measurement variance {noise.measurement!r} must be positive and finite.")
    for name, variance in (("Level", noise.level), ("Slope", noise.slope or 0.0)):
        if not (math.isfinite(variance) and variance >= 0.0):
            raise ConfigurationError(f"{name} variance {variance!r} must be finite and not negative.")
    data = series(steps, values, least=noise.unknowns + 1)
    # Subtracted first, so that a level far from zero costs no digits.
    base = float(data.values[data.seen][0])
    passed = forward(data._replace(values=data.values - base), noise)
    innovations, variances = predictions(passed)
    means, covariances = backward(passed)
    judged = ~np.isnan(innovations)
    terms = np.log(2.0 * math.pi * variances[judged]) + innovations[judged] ** 2 / variances[judged]
    level_sd, slope_sd = np.sqrt(np.maximum(np.stack([covariances[:, 0, 0], covariances[:, 1, 1]]), 0.0))
    return Smoothed(
        steps=data.steps,
        values=data.values,
        noise=noise,
        level=base + means[:, 0],
        slope=means[:, 1],
        level_sd=level_sd,
        slope_sd=slope_sd,
        innovations=innovations,
        innovation_variances=variances,
        log_likelihood=-0.5 * float(terms.sum()),
    )
