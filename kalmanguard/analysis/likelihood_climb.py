"""Maximum likelihood by Fisher scoring, within a family of noisy autoregressions: a pair of poles, or two real ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit

from kalmanguard.analysis.noisy_autoregression import NoisyAutoregression, information, log_likelihood
from kalmanguard.analysis.second_order import Pair
from kalmanguard.records import FloatArray

#: Stop when the score promises less than this rise of the log-likelihood: a thousandth of a standard error.
_ENOUGH = 1e-6
#: Most iterations, step of the forward differences, and the longest step of a coordinate.
_ITERATIONS, _DIFFERENCE, _STRIDE = 40, 1e-5, 1.5

#: Coordinates to the model and the derivatives of (phi_1, phi_2, log ratio) by them.
Family = Callable[[FloatArray], tuple[NoisyAutoregression, FloatArray]]


def oscillating(u: FloatArray) -> tuple[NoisyAutoregression, FloatArray]:
    """A conjugate pair: coordinates are log decay, logit of angle / pi, log ratio."""
    pair, ratio = pair_of(u)
    slopes = np.eye(3)
    slopes[:2, :2] = pair.slopes() * (pair.decay, pair.angle * (1.0 - pair.angle / math.pi))
    return NoisyAutoregression(*pair.coefficients(), ratio), slopes


def pair_of(u: FloatArray) -> tuple[Pair, float]:
    """Pair and ratio from the coordinates of `oscillating`."""
    return Pair(math.exp(u[0]), math.pi * float(expit(u[1]))), math.exp(u[2])


def coordinates_of(pair: Pair, ratio: float) -> FloatArray:
    """Coordinates of `oscillating`."""
    return np.array([math.log(pair.decay), float(logit(pair.angle / math.pi)), math.log(ratio)])


def overdamped(u: FloatArray) -> tuple[NoisyAutoregression, FloatArray]:
    """Two real poles: coordinates are their inverse hyperbolic tangents, and log ratio."""
    first, second = math.tanh(u[0]), math.tanh(u[1])
    slopes = np.eye(3)
    slopes[:2, :2] = np.array([[1.0, 1.0], [-second, -first]]) * (1.0 - first * first, 1.0 - second * second)
    return NoisyAutoregression(first + second, -first * second, math.exp(u[2])), slopes


class Peak(NamedTuple):
    """Where the likelihood is largest, its logarithm there, and whether the climb has come to an end."""

    coordinates: FloatArray
    log_likelihood: float
    converged: bool


def climb(family: Family, start: FloatArray, low: FloatArray, high: FloatArray, values: FloatArray) -> Peak:
    """Climb from a start to the top of the likelihood, in a box.

    Fisher scoring with the damping of Levenberg and Marquardt: the information is known in closed form, so a step costs
    the gradient alone. Some ten steps; a coordinate at the box's edge stays there.
    """
    u, damped = np.clip(start, low, high), 1e-3
    top = log_likelihood(family(u)[0], values)
    for _ in range(_ITERATIONS):
        model, slopes = family(u)
        matrix = values.size * (slopes.T @ information(model) @ slopes)
        shifted = u + np.where(u + _DIFFERENCE <= high, _DIFFERENCE, -_DIFFERENCE) * np.eye(3)
        gradient = np.array([log_likelihood(family(row)[0], values) - top for row in shifted]) / np.diag(shifted - u)
        free = ~(((u <= low) & (gradient < 0.0)) | ((u >= high) & (gradient > 0.0)))
        matrix, gradient = matrix[np.ix_(free, free)], gradient[free]
        scale = np.diag(np.diag(matrix) + 1e-3)
        while damped < 1e6:
            step = np.linalg.solve(matrix + damped * scale, gradient)
            promised = 0.5 * float(gradient @ step)
            trial = u.copy()
            trial[free] += np.clip(step, -_STRIDE, _STRIDE)
            trial = np.clip(trial, low, high)
            value = log_likelihood(family(trial)[0], values)
            if value >= top or promised < _ENOUGH:
                break
            damped = max(8.0 * damped, 1e-3)
        else:
            return Peak(u, top, False)
        if value >= top:
            u, top = trial, value
        damped = max(damped / 8.0, 1e-8)
        if promised < _ENOUGH:
            return Peak(u, top, True)
    return Peak(u, top, False)
