"""Oscillation: a line in the spectrum of a window, by Fisher's g-test, and the alternation that probes cannot see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kalmanguard.estimators.autocovariance import Interval, Moments, jackknife
from kalmanguard.records import FloatArray


class SpectralLine(NamedTuple):
    """The largest line of a periodogram: its share of the power, frequency in cycles per step, and p-value."""

    share: float
    frequency: float
    p_value: float


def spectral_line(series: FloatArray, *, rank: float = 1.0) -> SpectralLine:
    """Test a window for one spectral line against white noise.

    Parameters
    ----------
    series
        Shape ``(n,)`` or ``(n, k)``, finite, at least 8 rows; the periodograms of columns are added.
    rank
        Number of independent columns that k correlated ones are worth; for one column 1. Smaller is more cautious.

    Returns
    -------
    SpectralLine
        With a p-value of 1 for a constant window.

    Notes
    -----
    For one Gaussian column g, the largest share of the m ordinates (zero and Nyquist frequency left out), has Fisher's
    exact distribution under white noise: EXACT. For a rank r the share of one ordinate is Beta(r, r (m - 1)) and the
    p-value is m times Chernoff's bound of its tail: conservative for columns of equal weight. Velocities are not white:
    whiten them first (`whiten`).

    References
    ----------
    Fisher, Proc. Royal Society A 125 (1929); Brockwell, Davis, "Time Series: Theory and Methods", 1991, section 10.2.

    Examples
    --------
    >>> steps = np.arange(64)
    >>> noise = np.random.default_rng(0).normal(size=64)
    >>> line = spectral_line(noise + 1.5 * np.sin(2 * np.pi * steps / 8))
    >>> line.frequency, line.p_value < 1e-4, spectral_line(noise).p_value > 0.05
    (0.125, True, True)
    """
    columns = series.reshape(len(series), -1)
    power = (np.abs(np.fft.rfft(columns - columns.mean(0), axis=0)) ** 2).sum(1)
    n = len(columns)
    inner = power[1 : (n + 1) // 2]
    total = float(inner.sum())
    if not total > 0.0 or not math.isfinite(total):
        return SpectralLine(0.0, 0.0, 1.0)
    at = int(inner.argmax())
    share, m = float(inner[at]) / total, len(inner)
    return SpectralLine(share, (at + 1) / n, g_test(share, m, rank=rank))


def g_test(share: float, ordinates: int, *, rank: float = 1.0) -> float:
    """P-value of the largest share of ``ordinates`` that are each a chi-square of ``2 rank`` degrees of freedom.

    Examples
    --------
    Fisher's table has 0.2752 as the 5 % point at 20 ordinates (Brockwell and Davis, table 10.2.1, has 0.270).

    >>> 0.04 < g_test(0.2752, 20) < 0.06
    True
    """
    m, g = ordinates, share
    if m < 2 or g >= 1.0:
        return 1.0 if m < 2 else 0.0
    if rank <= 1.0:
        first = m * (1.0 - g) ** (m - 1)
        if first < 1e-3:
            return first  # the terms that follow are smaller than rounding, and it is an upper bound
        terms = (
            (-1) ** (j - 1) * math.comb(m, j) * (1.0 - j * g) ** (m - 1) for j in range(1, min(m, int(1.0 / g)) + 1)
        )
        return min(1.0, max(0.0, math.fsum(terms)))
    p = 1.0 / m
    if g <= p:
        return 1.0
    exponent = rank * (math.log(g / p) + (m - 1) * math.log((1.0 - g) / (1.0 - p)))
    return min(1.0, m * math.exp(exponent))


def whiten(velocities: FloatArray, m: Moments) -> FloatArray:
    """Take the memory of momentum out of a window of velocities, ``u_t = v_t - rho v_{t-1}``.

    An alternation (negative rho) is left in: it is what is looked for. Shape ``(n, k)`` to ``(n - 1, k)``.
    """
    rho = min(max(m.neighbours / m.power, 0.0), 0.99) if m.power > 0.0 else 0.0
    whitened: FloatArray = velocities[1:] - rho * velocities[:-1]
    return whitened


def period_two(blocks: Sequence[Moments]) -> Interval:
    """Mean cosine between neighbouring updates, with its interval: -1 is the two-cycle of the edge of stability.

    The loss sees a two-cycle only through its square, and probes at even distances not at all; the updates do. A value
    below -0.5 says that most of an update undoes the one before. Full-batch training lives there in good health, so it
    is a reason to look at the held-out loss, no more. Guarantee: ASYMPTOTIC (`jackknife`).

    Examples
    --------
    >>> period_two((Moments(power=2.0, neighbours=-1.8),) * 8).estimate
    -0.9
    """
    return jackknife(blocks, lambda m: m.neighbours / m.power if m.power > 0.0 else math.nan)
