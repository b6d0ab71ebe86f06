"""What a series says about its oscillation, as a result to print and to draw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kalmanguard.analysis.drawing import BLUE, axes_or_new
from kalmanguard.analysis.noisy_autoregression import NoisyAutoregression
from kalmanguard.estimators.autocovariance import Interval
from kalmanguard.records import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True, eq=False)
class Oscillation:
    """What a series says about its oscillation.

    Attributes
    ----------
    identified
        Whether a pair of conjugate poles explains the series better than real poles do, by more than chance.
    damping
        Damping ratio zeta with its interval; nan, without bounds, when nothing is identified.
    frequency
        Natural frequency omega_n in radians per step, likewise.
    snr
        Power of the process over the variance of the measurement noise.
    evidence, needed
        Twice the log-likelihood ratio over the best real poles, and how much of it counts as an oscillation.
    log_likelihood
        At the maximum, each column at its own scale.
    converged
        Whether the climb of the likelihood came to its end.
    values
        What was given, less the mean, shape ``(n, k)``.
    model
        Of the best fit; real poles when nothing is identified.
    """

    identified: bool
    damping: Interval
    frequency: Interval
    snr: float
    evidence: float
    needed: float
    log_likelihood: float
    converged: bool
    values: FloatArray
    model: NoisyAutoregression

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the periodogram, scaled to power 1 and averaged over columns, and the fitted spectrum."""
        axes = axes_or_new(axes)
        n = len(self.values)
        scaled = self.values / self.values.std(0)
        power = (np.abs(np.fft.rfft(scaled, axis=0)) ** 2).mean(1)[1:] / n
        angle = 2.0 * math.pi * np.arange(1, len(power) + 1) / n
        z = np.exp(-1j * angle)
        density = 1.0 / np.abs(1.0 - z * (self.model.phi_1 + self.model.phi_2 * z)) ** 2 + self.model.ratio
        axes.loglog(angle, power, ".", markersize=2, color="0.6", label="periodogram")
        axes.loglog(angle, density / (self.model.variances()[0] + self.model.ratio), color=BLUE, label="fitted")
        axes.set_xlabel("radians per step")
        axes.legend()
        return axes

    def __str__(self) -> str:
        if not self.identified:
            return (
                f"no oscillation identified: twice the log-likelihood ratio over real poles is {self.evidence:.1f}, "
                f"and {self.needed:.1f} are needed"
            )
        zeta, omega = self.damping, self.frequency
        return (
            f"damping ratio {zeta.estimate:.3g} ({zeta.low:.3g} to {zeta.high:.3g}), natural frequency "
            f"{omega.estimate:.4g} ({omega.low:.4g} to {omega.high:.4g}) radians per step, signal to noise "
            f"{self.snr:.3g}{'' if self.converged else '; the likelihood has not converged'}"
        )
