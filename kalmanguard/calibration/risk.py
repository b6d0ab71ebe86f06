"""Learn-then-test: the least conservative setting whose false-alarm rate is certified, with runs as the unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray


@final
@dataclass(frozen=True, slots=True)
class Certification:
    """What a fixed sequence of tests has certified.

    Attributes
    ----------
    chosen
        Index of the least conservative certified candidate; ``None`` when not even the first one is.
    rates
        Mean loss of each candidate over the runs.
    p_values
        Of the hypothesis that the candidate's expected loss exceeds the target.
    target, delta, runs
        What was asked for.
    """

    chosen: int | None
    rates: tuple[float, ...]
    p_values: tuple[float, ...]
    target: float
    delta: float
    runs: int


def certify(losses: FloatArray, *, target: float, delta: float) -> Certification:
    """Certify candidates from the most conservative on, until one fails: with probability ``1 - delta`` none is wrong.

    Parameters
    ----------
    losses
        Loss in [0, 1] of each run under each candidate, shape ``(runs, candidates)``, the candidates in an order fixed
        beforehand, the most conservative first. Columns of zeros and ones only are tested by the exact binomial test,
        others by Hoeffding and Bentkus.
    target
        Expected loss of a new run that is allowed, in (0, 1).
    delta
        Probability that any candidate certified here has a larger one, in (0, 1).

    Raises
    ------
    ConfigurationError
        Losses are not such an array, or target or delta lie outside (0, 1).

    Notes
    -----
    Guarantee: EXACT if the runs are independent draws of what the new run is drawn from, and neither the candidates nor
    their order were chosen by looking at these runs. The run is the unit, not the step: without a single false alarm in
    N runs the bound is ``-ln(delta) / N`` (`upper_bound`), the rule of three, however many steps they had. Fixed
    sequence testing and the Hoeffding-Bentkus p-value are MAPIE's; the binomial one is computed here from the whole
    count, since ``ceil(n * mean)`` of a rounded mean may count one too many.

    References
    ----------
    Angelopoulos, Bates, Candes, Jordan, Lei, "Learn then test", arXiv 2110.01052, theorem 1 and proposition 2.

    Examples
    --------
    >>> losses = np.zeros((100, 3))
    >>> losses[:20, 2] = 1.0
    >>> certify(losses, target=0.05, delta=0.05).chosen
    1
    """
    known = np.asarray(losses, dtype=np.float64)
    if known.ndim != 2 or known.size == 0 or not bool(((known >= 0.0) & (known <= 1.0)).all()):
        raise ConfigurationError("Losses are needed in shape (runs, candidates), at least one, all within [0, 1].")
    _check(target, "target")
    _check(delta, "delta")
    from mapie.risk_control import control_fwer

    n = len(known)
    p_values = [p_value(column, target=target) for column in known.T]
    passed = control_fwer(np.array(p_values), delta, fwer_method="fixed_sequence")
    return Certification(
        chosen=int(passed[-1]) if len(passed) else None,
        rates=tuple(known.mean(axis=0).tolist()),
        p_values=tuple(p_values),
        target=target,
        delta=delta,
        runs=n,
    )


def p_value(losses: FloatArray, *, target: float) -> float:
    """P-value of the hypothesis that the expected loss exceeds ``target``: binomial for zeros and ones, else bounded.

    >>> round(p_value(np.zeros(59), target=0.05), 3)
    0.048
    """
    _check(target, "target")
    n = len(losses)
    if bool(np.isin(losses, (0.0, 1.0)).all()):
        from scipy.stats import binom

        return float(binom.cdf(int(np.sum(losses)), n, target))
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    return min(1.0, float(compute_hoeffding_bentkus_p_value(np.array([np.mean(losses)]), n, target)[0, 0]))


def upper_bound(events: int, n: int, *, delta: float) -> float:
    """Largest rate that ``events`` in n independent trials do not exclude: one-sided, exact (Clopper, Pearson 1934).

    Without an event it is ``1 - delta^(1/n)``, which is below ``-ln(delta) / n``: 3/n at 95 %, the rule of three. n
    counts independent trials, hence runs; steps only where they are independent.

    >>> upper_bound(0, 1000, delta=0.05) < -math.log(0.05) / 1000 < 0.003
    True
    """
    _check(delta, "delta")
    if not 0 <= events <= n or n < 1:
        raise ConfigurationError(f"{events} events in {n} trials: at least one trial, and no more events than trials.")
    if events == 0:
        return -math.expm1(math.log(delta) / n)
    if events == n:
        return 1.0
    from scipy.stats import beta

    return float(beta.ppf(1.0 - delta, events + 1, n - events))


def runs_needed(target: float, *, delta: float) -> int:
    """Runs without any event that certify ``target``: the least n with ``(1 - target)^n <= delta``.

    >>> runs_needed(0.05, delta=0.05)
    59
    """
    _check(target, "target")
    _check(delta, "delta")
    return math.ceil(math.log(delta) / math.log1p(-target))


def parse_candidates(text: str) -> tuple[str, tuple[float | int, ...]]:
    """Read ``"suspicion=12,10,8"``: a setting, and its candidates from the most conservative on.

    Raises
    ------
    ConfigurationError
        The text does not follow the notation, or names a value twice.
    """
    name, _, values = text.partition("=")
    try:
        found = tuple(_number(value) for value in values.split(","))
    except ValueError:
        found = ()
    if not name or not found or len(set(found)) != len(found):
        raise ConfigurationError(f"{text!r} is not of the form NAME=VALUE,VALUE,... with different numbers.")
    return name.strip(), found


def _number(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _check(value: float, name: str) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigurationError(f"{name} = {value} is outside (0, 1).")


def flags(counts: Sequence[int]) -> FloatArray:
    """Ones where there was any event.

    >>> flags([0, 3, 1]).tolist()
    [0.0, 1.0, 1.0]
    """
    return (np.asarray(counts) > 0).astype(np.float64)
