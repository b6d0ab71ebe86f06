"""Operating characteristics: rates of false alarms with intervals, delays, and thresholds for a rate that is wanted."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kalmanguard.analysis.study.cases import Result
from kalmanguard.analysis.study.detectors import START
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.autocovariance import BLOCK


class Rate(NamedTuple):
    """First alarms of runs, the steps that were watched until then, and their ratio per 1,000 steps with its bounds."""

    alarms: int
    steps: int
    per_1000: float
    low: float
    high: float


class Share(NamedTuple):
    """How many of how many, with the bounds of the share."""

    hits: int
    of: int
    low: float
    high: float


class Detection(NamedTuple):
    """What a threshold does on runs that become unstable.

    Attributes
    ----------
    early
        Runs with an alarm before anything was changed; they are left out of all that follows.
    seen
        Runs with an alarm before they end.
    in_time
        Of the harmed runs those with an alarm no later than the harm.
    delay, delay_high
        Median and 90 % point of the steps from the crossing of the bound to the alarm; infinite where there is none,
        negative where the learning rate crept and the alarm came first.
    """

    early: Share
    seen: Share
    in_time: Share
    delay: float
    delay_high: float


def first_alarm(run: Result, family: str, threshold: float) -> int | None:
    """The step of the first alarm, or ``None``."""
    return next((int(step) for step, value in run["records"][family] if value >= threshold), None)


def poisson_rate(alarms: int, steps: int) -> Rate:
    """Alarms per 1,000 steps with a 95 % interval.

    Notes
    -----
    EXACT for a Poisson count over a fixed number of steps (Garwood, Biometrika 28 (1936)); here a run stops counting at
    its first alarm, which makes it ASYMPTOTIC, and judgements of one run overlap.

    Examples
    --------
    >>> [round(value, 2) for value in poisson_rate(0, 1000)[2:]]  # none in 1,000 steps: up to 3.7 are possible
    [0.0, 0.0, 3.69]
    """
    from scipy.stats import chi2

    if alarms < 0 or steps < 1:
        raise ConfigurationError(f"{alarms} alarms in {steps} steps: there is no rate without a step.")
    low = float(chi2.ppf(0.025, 2 * alarms)) / 2.0 if alarms else 0.0
    high = float(chi2.ppf(0.975, 2 * (alarms + 1))) / 2.0
    return Rate(alarms, steps, *(1000.0 * value / steps for value in (alarms, low, high)))


def binomial_share(hits: int, of: int) -> Share:
    """A share with its 95 % interval (Clopper and Pearson, Biometrika 26 (1934)): EXACT; 0 to 1 of nothing.

    Examples
    --------
    >>> binomial_share(0, 10).high < 0.31
    True
    """
    from scipy.stats import beta

    low = float(beta.ppf(0.025, hits, of - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, of - hits)) if hits < of else 1.0
    return Share(hits, of, low, high)


def false_alarms(runs: Sequence[Result], family: str, threshold: float) -> Rate:
    """Rate over runs that are stable from the first judgement to their end."""
    alarms = [first_alarm(run, family, threshold) for run in runs]
    steps = sum((at or run["steps"]) - START + BLOCK for at, run in zip(alarms, runs, strict=True))
    return poisson_rate(sum(at is not None for at in alarms), steps)


def detection(runs: Sequence[Result], family: str, threshold: float) -> Detection:
    """What comes of runs that cross the bound."""
    alarms = [(first_alarm(run, family, threshold), run) for run in runs]
    late = [(at, run) for at, run in alarms if at is None or at > run["change"]]
    harmed = [(at, run) for at, run in late if run["harm"] is not None]
    delays = sorted(math.inf if at is None else float(at - run["crossing"]) for at, run in late) or [math.nan]
    return Detection(
        binomial_share(len(alarms) - len(late), len(alarms)),
        binomial_share(sum(at is not None for at, _ in late), len(late)),
        binomial_share(sum(at is not None and at <= run["harm"] for at, run in harmed), len(harmed)),
        delays[len(delays) // 2],
        delays[int(0.9 * len(delays))],
    )


def thresholds(runs: Sequence[Result], family: str, *, points: int) -> list[float]:
    """Thresholds that the curve is drawn at: evenly spread over the ranks of the values that are first reached."""
    values = np.unique([value for run in runs for _, value in run["records"][family]])
    chosen = values[np.unique(np.linspace(0, len(values) - 1, points).round().astype(int))] if len(values) else values
    return [float(value) for value in chosen]


def threshold_at(runs: Sequence[Result], family: str, *, per_1000: float) -> float:
    """The least threshold whose rate of false alarms on these runs is at most the one that is wanted."""
    values = sorted({float(value) for run in runs for _, value in run["records"][family]})
    above = [math.nextafter(value, math.inf) for value in values]
    at = bisect_left(above, -per_1000, key=lambda threshold: -false_alarms(runs, family, threshold).per_1000)
    return above[at] if at < len(above) else math.inf
