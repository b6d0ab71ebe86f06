"""Consistency of a filter: are its innovations as large, as white and as centred as it says?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from kalmanguard.analysis.checks import Check, Verdict, centre, size
from kalmanguard.analysis.drawing import BLUE, axes_or_new
from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray, Guarantee

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True, eq=False)
class Consistency:
    """What the innovations say of their filter.

    Attributes
    ----------
    nis, mean, whiteness
        Size, centre and memory of the normalised innovations.
    autocorrelations
        At lags 1 to m, averaged over columns, shape ``(m,)``.
    bound
        Each of them lies within this with the confidence asked for, if the innovations are white.
    """

    nis: Check
    mean: Check
    whiteness: Check
    autocorrelations: FloatArray
    bound: float

    @property
    def verdict(self) -> Verdict:
        """That of the first check that fails, in the order size, centre, memory."""
        checks = (self.nis, self.mean, self.whiteness)
        return next((c.verdict for c in checks if c.verdict is not Verdict.CONSISTENT), Verdict.CONSISTENT)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the autocorrelations with their bounds; returns the axes."""
        axes = axes_or_new(axes)
        axes.axhspan(-self.bound, self.bound, color=BLUE, alpha=0.15, linewidth=0)
        axes.vlines(np.arange(1, len(self.autocorrelations) + 1), 0.0, self.autocorrelations, color=BLUE)
        axes.axhline(0.0, color="0.4", linewidth=0.8)
        axes.set_xlabel("lag")
        axes.set_ylabel("autocorrelation of innovations")
        return axes

    def __str__(self) -> str:
        return "\n".join(map(str, (self.nis, self.mean, self.whiteness)))


def consistency(
    innovations: ArrayLike,
    variances: ArrayLike,
    *,
    rank: float | None = None,
    lags: int = 10,
    confidence: float = 0.95,
) -> Consistency:
    """Judge a filter by its one-step-ahead innovations.

    With ``z = innovation / sqrt(variance)``: the NIS, the mean of ``z^2``, by its chi-square interval; the mean of z by
    its normal interval; whiteness by Ljung and Box's statistic of the first lags.

    Parameters
    ----------
    innovations
        Shape ``(n,)`` or ``(n, k)``; rows with nan (nothing measured) are left out.
    variances
        As the filter states them, positive, shape ``(n,)``, or ``(n, k)``.
    rank
        Number of independent columns that k correlated ones are worth, k by default.
    lags
        How many autocorrelations are tested.
    confidence
        That a consistent filter passes *all three* checks, at least (each has a third of the rest).

    Raises
    ------
    ConfigurationError
        Shapes do not fit, a variance is not positive, there are too few rows for the lags, or arguments are out of
        range.

    Notes
    -----
    Assumes Gaussian innovations; with heavy tails the NIS interval is too narrow. EXACT for NIS and mean, with the
    variances given and the columns independent; with ``rank`` and for whiteness ASYMPTOTIC. If the variances were
    fitted to the same innovations, NIS is about 1 whatever the model, and whiteness alone tells. Too little process
    noise shows as NIS above 1 and positive autocorrelation, too much as NIS below 1 and negative; a bias of b standard
    deviations in the mean adds b^2 to the NIS.

    References
    ----------
    Bar-Shalom, Li, Kirubarajan, "Estimation with Applications to Tracking and Navigation", 2001, section 5.4; Ljung,
    Box, Biometrika 65 (1978); Mehra, IEEE Trans. Automatic Control 15 (1970).

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=500)
    >>> print(consistency(z, np.ones(500)))
    NIS 1.03, 0.855 to 1.16 expected (p = 0.64): consistent
    mean -0.0269, -0.107 to 0.107 expected (p = 0.55): consistent
    whiteness 8.93, 0 to 21.7 expected (p = 0.54): consistent
    >>> consistency(z, np.full(500, 0.5)).verdict
    <Verdict.OVERCONFIDENT: 'overconfident'>
    """
    z = _normalised(innovations, variances, lags)
    n, k = z.shape
    if not 0.0 < confidence < 1.0:
        raise ConfigurationError(f"confidence = {confidence!r} must be between 0 and 1, such as 0.95.")
    if rank is not None and not 1.0 <= rank <= k:
        raise ConfigurationError(f"rank = {rank!r} must be from 1 to the number of columns, {k}.")
    worth, chance = float(k if rank is None else rank), (1.0 - confidence) / 3.0
    exact = Guarantee.EXACT if rank is None or rank == k else Guarantee.ASYMPTOTIC
    nis = size("NIS", float((z * z).mean()), n * worth, chance, exact)
    mean = centre(float(z.mean()), n * worth, chance, exact)
    autocorrelations, whiteness = _memory(z, worth, lags, chance)
    from scipy.special import ndtri

    half = float(ndtri(0.5 + confidence / 2.0)) / math.sqrt(n * worth)
    return Consistency(nis, mean, whiteness, autocorrelations, half)


def _normalised(innovations: ArrayLike, variances: ArrayLike, lags: int) -> FloatArray:
    try:
        v, s = np.asarray(innovations, dtype=np.float64), np.asarray(variances, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"Innovations and variances must be numbers: {error}.") from None
    if v.ndim not in (1, 2) or v.size == 0 or s.shape not in (v.shape, v.shape[:1]):
        raise ConfigurationError(f"Innovations {v.shape} must be (n,) or (n, k), and variances {s.shape} as many rows.")
    v = v.reshape(len(v), -1)
    s = np.broadcast_to(s.reshape(len(s), -1), v.shape)
    kept = ~(np.isnan(v) | np.isnan(s)).any(1)
    v, s = v[kept], s[kept]
    if lags < 1 or len(v) < 3 * lags:
        raise ConfigurationError(f"{len(v)} rows that are not nan are too few for {lags} lags: {3 * lags} are needed.")
    if not np.isfinite(v).all() or not (np.isfinite(s) & (s > 0.0)).all():
        raise ConfigurationError("Innovations must be finite and variances positive and finite.")
    return v / np.sqrt(s)


def _memory(z: FloatArray, worth: float, lags: int, chance: float) -> tuple[FloatArray, Check]:
    """Ljung and Box's statistic, summed over columns and scaled to as many degrees of freedom as they are worth."""
    from scipy.special import chdtrc, chdtri
    from statsmodels.stats.diagnostic import acorr_ljungbox
    from statsmodels.tsa.stattools import acf

    k = z.shape[1]
    changing = [column for column in z.T if column.std() > 0.0]
    autocorrelations = np.zeros(lags)
    statistic = 0.0
    for column in changing:
        autocorrelations += acf(column, nlags=lags, fft=False)[1:] / k
        statistic += float(acorr_ljungbox(column, lags=[lags])["lb_stat"].iloc[0]) * worth / k
    freedom = lags * worth
    high = float(chdtri(freedom, chance))
    verdict = Verdict.CONSISTENT if statistic <= high else Verdict.CORRELATED
    p = float(chdtrc(freedom, statistic))
    return autocorrelations, Check("whiteness", statistic, 0.0, high, p, verdict, Guarantee.ASYMPTOTIC)
