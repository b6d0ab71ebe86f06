"""A pair of conjugate poles: damping ratio and natural frequency, decay and angle, autoregression; one from another."""

from __future__ import annotations

import cmath
import math
from typing import NamedTuple

import numpy as np

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray


class Pair(NamedTuple):
    """Poles ``z = exp(-decay +- i angle)``, per step, with ``decay > 0`` and ``0 < angle < pi``.

    ::

        decay = zeta omega,    angle = omega sqrt(1 - zeta^2),    x_t = phi_1 x_{t-1} + phi_2 x_{t-2}

    Examples
    --------
    >>> pair = Pair.of(0.1, 0.5)
    >>> round(pair.damping, 6), round(pair.frequency, 6)
    (0.1, 0.5)
    >>> [round(phi, 3) for phi in pair.coefficients()]
    [1.672, -0.905]
    """

    decay: float
    angle: float

    @classmethod
    def of(cls, damping: float, frequency: float) -> Pair:
        """From zeta in (0, 1) and omega_n in radians per step.

        Raises
        ------
        ConfigurationError
            There is no such pair, or it turns by more than half a circle a step, which steps cannot show.
        """
        if not 0.0 < damping < 1.0:
            raise ConfigurationError(f"Damping ratio {damping!r} must be between 0 and 1: other poles are no pair.")
        angle = frequency * math.sqrt(1.0 - damping * damping)
        if not 0.0 < angle < math.pi:
            raise ConfigurationError(f"Frequency {frequency!r} must be positive and turn by less than pi a step.")
        return cls(damping * frequency, angle)

    @property
    def damping(self) -> float:
        """Damping ratio zeta."""
        return self.decay / self.frequency

    @property
    def frequency(self) -> float:
        """Natural frequency omega_n, radians per step."""
        return math.hypot(self.decay, self.angle)

    @property
    def poles(self) -> tuple[complex, complex]:
        """The pole in the upper half plane, and its conjugate."""
        z = cmath.rect(math.exp(-self.decay), self.angle)
        return z, z.conjugate()

    def coefficients(self) -> tuple[float, float]:
        """``phi_1 = 2 exp(-decay) cos(angle)`` and ``phi_2 = -exp(-2 decay)``."""
        radius = math.exp(-self.decay)
        return 2.0 * radius * math.cos(self.angle), -radius * radius

    def slopes(self) -> FloatArray:
        """Derivatives of (phi_1, phi_2) in their rows by (decay, angle)."""
        first, second = self.coefficients()
        return np.array([[-first, -2.0 * math.exp(-self.decay) * math.sin(self.angle)], [-2.0 * second, 0.0]])

    def damping_slopes(self) -> FloatArray:
        """Derivatives of (zeta, omega_n) in their rows by (decay, angle)."""
        a, b, w = self.decay, self.angle, self.frequency
        return np.array([[b * b / w**3, -a * b / w**3], [a / w, b / w]])
