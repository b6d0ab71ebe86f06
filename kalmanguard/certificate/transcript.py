"""How far a fixed, reused probe can be trusted: a bound over everything that its verdicts could have led to."""

from __future__ import annotations

import math

import numpy as np

from kalmanguard.errors import ConfigurationError


def log_transcripts(steps: int, interventions: int, kinds: int = 1) -> float:
    """``ln sum_{j <= k} C(T, j) A^j``: ways in which at most ``k`` of ``T`` steps get one of ``A`` treatments.

    >>> round(log_transcripts(4, 2, 3), 9) == round(math.log(1 + 4 * 3 + 6 * 9), 9)
    True
    """
    if interventions >= steps:
        return steps * math.log1p(kinds)
    j = np.arange(1, interventions + 1, dtype=np.float64)
    terms = np.concatenate(([0.0], np.cumsum(np.log((steps - j + 1) / j) + math.log(kinds))))
    top = float(terms.max())
    return top + math.log(float(np.exp(terms - top).sum()))


def transcript_bound(
    *, examples: int, steps: int, interventions: int, kinds: int, loss_range: float, delta: float
) -> float:
    r"""Largest distance between the probe's mean and the population's, at all steps at once.

    With probability ``1 - delta``, for all ``t <= T``,

    ``|y(theta_t) - L(theta_t)| <= B sqrt((ln sum_{j <= k} C(T, j) A^j + ln(2 (T + 1) / delta)) / (2 n))``.

    It holds if the ``n`` examples are drawn independently of data order and seeds, losses (or differences) lie in an
    interval of length ``B``, and training learns of the probe through at most ``k`` interventions of ``A`` kinds; slot,
    rung and action all count as kind. It lapses when the caller acts on probe values.

    Parameters
    ----------
    examples
        n, number of examples in the probe.
    steps
        T, number of steps.
    interventions
        k, number of interventions.
    kinds
        A, number of different interventions that were possible at a step.
    loss_range
        B, length of the interval that clipped losses lie in; twice the clip for paired differences.
    delta
        Error probability.

    Raises
    ------
    ConfigurationError
        When a parameter lies outside its range.

    Notes
    -----
    Guarantee: EXACT under the assumptions named (Hoeffding, and a union over transcripts). Cost: 30 ns an intervention.

    Examples
    --------
    >>> round(transcript_bound(examples=16, steps=250, interventions=10, kinds=1, loss_range=1.0, delta=0.05), 2)
    1.24
    >>> round(transcript_bound(examples=10_000, steps=10_000, interventions=20, kinds=1, loss_range=1.0, delta=0.05), 3)
    0.088
    """
    for name, value, least in (
        ("examples", examples, 1), ("steps", steps, 1), ("interventions", interventions, 0), ("kinds", kinds, 1)
    ):  # fmt: skip
        if value < least:
            raise ConfigurationError(f"{name} = {value}: must be at least {least}.")
    if not 0 < loss_range < math.inf:
        raise ConfigurationError(f"loss_range = {loss_range}: must be positive and finite.")
    if not 0 < delta < 1:
        raise ConfigurationError(f"delta = {delta}: an error probability lies between 0 and 1.")
    nats = log_transcripts(steps, interventions, kinds) + math.log(2.0 * (steps + 1) / delta)
    return loss_range * math.sqrt(nats / (2.0 * examples))
