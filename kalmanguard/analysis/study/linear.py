"""Heavy-ball descent on a quadratic with gradient noise: simulated exactly, its moments in closed form."""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray

#: Longer updates per unit of learning rate end a simulation: products of four of them must be numbers.
LONGEST = 1e60


class Descent(NamedTuple):
    """Updates per unit of learning rate, shape ``(steps, n)``, and the losses after them, shape ``(steps,)``."""

    velocities: FloatArray
    losses: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Gradient descent with momentum on ``1/2 sum lambda_i x_i^2``, from ``x_i = 1``, with noise in the gradient.

    ``b <- beta b + lambda x + sigma sqrt(lambda / lambda_1) w``, ``x <- x - eta b``, with independent standard normal
    ``w``: gradient noise has the covariance of the Hessian, as minibatch noise about has near a minimum. Every mode is
    ``z^2 - (1 + beta - eta lambda) z + beta = 0`` on its own.

    Parameters
    ----------
    curvatures
        Eigenvalues ``lambda_i`` of the Hessian, positive, the largest first.
    momentum
        ``beta`` in [0, 1).
    noise
        ``sigma``, standard deviation of the gradient in the steepest direction; at least 0.

    Raises
    ------
    ConfigurationError
        A curvature is not positive or the first is not the largest, or momentum or noise lies outside its range.

    Notes
    -----
    The arithmetic of `torch.optim.SGD` without dampening, Nesterov or weight decay, also where the learning rate
    changes between steps: EXACT.

    References
    ----------
    Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Comput. Math. 4 (1964), section 2.

    Examples
    --------
    >>> system = System(curvatures=(1.0,), momentum=0.5, noise=0.0)
    >>> [float(system.simulate(np.full(200, rate), seed=0).losses[-1].round()) for rate in (2.9, 3.0)]
    [0.0, 4.0]
    >>> system.limit
    3.0
    """

    curvatures: tuple[float, ...]
    momentum: float
    noise: float

    def __post_init__(self) -> None:
        values = self.curvatures
        if not values or not all(0.0 < value < math.inf for value in values) or values[0] < max(values):
            raise ConfigurationError(f"curvatures = {values}: give positive finite numbers, the largest first.")
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigurationError(f"momentum = {self.momentum} must be at least 0 and below 1.")
        if not 0.0 <= self.noise < math.inf:
            raise ConfigurationError(f"noise = {self.noise}: a standard deviation is finite and not negative.")

    @property
    def limit(self) -> float:
        """Learning rate from which the steepest mode does not decay: ``2 (1 + beta) / lambda_1``."""
        return 2.0 * (1.0 + self.momentum) / self.curvatures[0]

    @property
    def effective_rank(self) -> float:
        """``(sum lambda)^2 / sum lambda^2``."""
        values = np.array(self.curvatures)
        return float(values.sum() ** 2 / (values**2).sum())

    def velocity_power(self, rate: float) -> float:
        """Mean squared length of an update per unit of learning rate, stationary, at a ``rate`` below the limit.

        ``sum_i 2 sigma_i^2 / ((1 - beta) (2 (1 + beta) - eta lambda_i))``.
        """
        values = np.array(self.curvatures)
        room = 2.0 * (1.0 + self.momentum) - rate * values
        if not (room > 0.0).all():
            raise ConfigurationError(f"rate = {rate} is not below the limit {self.limit}: nothing is stationary there.")
        variances = self.noise**2 * values / values[0]
        return float((2.0 * variances / ((1.0 - self.momentum) * room)).sum())

    def simulate(self, rates: FloatArray, *, seed: int) -> Descent:
        """Train with the learning rates ``(steps,)``; ends early when an update is longer than `LONGEST`."""
        curvatures = np.array(self.curvatures)
        scales = self.noise * np.sqrt(curvatures / curvatures[0])
        noise = np.random.default_rng(seed).normal(size=(len(rates), len(curvatures))) * scales
        x, b = np.ones(len(curvatures)), np.zeros(len(curvatures))
        velocities, losses = np.empty_like(noise), np.empty(len(rates))
        for step, rate in enumerate(rates):
            b = self.momentum * b + curvatures * x + noise[step]
            x = x - rate * b
            velocities[step] = -b
            losses[step] = 0.5 * float(curvatures.dot(x * x))
            if float(b.dot(b)) > LONGEST * LONGEST:
                return Descent(velocities[:step], losses[:step])
        return Descent(velocities, losses)


def heavy_ball_poles(eta_lambda: float, momentum: float) -> tuple[complex, complex]:
    """Roots of ``z^2 - (1 + beta - eta lambda) z + beta``, the larger modulus first.

    Examples
    --------
    >>> round(abs(heavy_ball_poles(0.3, 0.9)[0]) ** 2, 6), round(heavy_ball_poles(3.8, 0.9)[0].real, 6)
    (0.9, -1.0)
    """
    half = complex(1.0 + momentum - eta_lambda) / 2.0
    root = (half * half - momentum) ** 0.5
    first, second = sorted((half + root, half - root), key=abs, reverse=True)
    return first, second


def pole_damping(z: complex) -> tuple[float, float]:
    """Damping ratio and natural frequency (radians per step) of one pole: ``s = ln z``, ``zeta = -Re(s) / |s|``.

    For one of a conjugate pair these are those of the pair. A pole between 0 and 1 has 1, and any pole outside the unit
    circle a negative damping ratio, so that ``zeta < 0`` and ``|z| > 1`` are the same event. Nan for ``z = 0`` and 1.

    Examples
    --------
    >>> import cmath
    >>> [round(value, 3) for value in pole_damping(cmath.rect(0.9, 0.5))], pole_damping(complex(0.5))[0]
    ([0.206, 0.511], 1.0)
    """
    if z in (0.0, 1.0) or not cmath.isfinite(z):
        return math.nan, math.nan
    s = cmath.log(z)
    return -s.real / abs(s), abs(s)


def stationary_jerk_ratio(eta_lambda: float, momentum: float) -> float:
    """Root mean square of the jerk over that of the acceleration, of one mode that gradient noise keeps in motion.

    ``((1 - beta) (3 - beta + 3/2 kappa) + kappa^2 / 2) / (1 - beta + kappa / 2)`` with ``kappa = eta lambda`` is its
    square. It is ``sqrt(3 - beta)`` for small ``kappa``, and 2 at the bound ``kappa = 2 (1 + beta)`` for every
    momentum; between them it falls where the mode resonates.

    Examples
    --------
    >>> [round(stationary_jerk_ratio(kappa, 0.9), 2) for kappa in (0.0, 0.3, 3.8)]
    [1.45, 1.1, 2.0]
    >>> round(stationary_jerk_ratio(0.1, 0.99), 2)  # below the published 0.707: a ringing mode is called stable
    0.67
    """
    slack = 1.0 - momentum
    above = slack * (3.0 - momentum + 1.5 * eta_lambda) + 0.5 * eta_lambda * eta_lambda
    return math.sqrt(above / (slack + 0.5 * eta_lambda))
