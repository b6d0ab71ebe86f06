"""Checks of a filter: a statistic, the interval that a consistent filter keeps to, and what follows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from kalmanguard.records import Guarantee


class Verdict(StrEnum):
    """What a check says: errors as large as claimed, larger, smaller; not centred; not white."""

    CONSISTENT = "consistent"
    OVERCONFIDENT = "overconfident"
    UNDERCONFIDENT = "underconfident"
    BIASED = "biased"
    CORRELATED = "correlated"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its statistic, the interval that a consistent filter keeps to, and the verdict.

    Attributes
    ----------
    name
        ``NIS``, ``mean``, ``whiteness`` or ``NEES``.
    statistic, low, high
        In the unit that the check's function states.
    p_value
        Two-sided where the interval is.
    verdict, guarantee
        What follows, and how well it is founded.
    """

    name: str
    statistic: float
    low: float
    high: float
    p_value: float
    verdict: Verdict
    guarantee: Guarantee

    def __str__(self) -> str:
        return (
            f"{self.name} {self.statistic:.3g}, {self.low:.3g} to {self.high:.3g} expected "
            f"(p = {self.p_value:.2g}): {self.verdict}"
        )


def size(name: str, statistic: float, freedom: float, chance: float, guarantee: Guarantee) -> Check:
    """Judge a mean of squares of which ``freedom`` are independent, by chi-square."""
    from scipy.special import chdtr, chdtrc, chdtri

    low = float(chdtri(freedom, 1.0 - chance / 2.0)) / freedom
    high = float(chdtri(freedom, chance / 2.0)) / freedom
    p = 2.0 * min(float(chdtr(freedom, statistic * freedom)), float(chdtrc(freedom, statistic * freedom)))
    verdict = (
        Verdict.OVERCONFIDENT if statistic > high
        else Verdict.UNDERCONFIDENT if statistic < low
        else Verdict.CONSISTENT
    )  # fmt: skip
    return Check(name, statistic, low, high, min(p, 1.0), verdict, guarantee)


def centre(statistic: float, count: float, chance: float, guarantee: Guarantee) -> Check:
    """Judge a mean of ``count`` independent standard normal numbers."""
    from scipy.special import ndtr, ndtri

    half = float(ndtri(1.0 - chance / 2.0)) / math.sqrt(count)
    p = 2.0 * float(ndtr(-abs(statistic) * math.sqrt(count)))
    return Check(
        "mean", statistic, -half, half, p, Verdict.CONSISTENT if abs(statistic) <= half else Verdict.BIASED, guarantee
    )
