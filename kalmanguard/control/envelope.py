"""The envelope of accepted probes: gated by the prediction, and ratcheted to the best state so far."""

from __future__ import annotations

import math
from typing import NamedTuple


class Envelope(NamedTuple):
    """The bound in force for one probe, all in loss units.

    ``start`` is the first probe y_0, ``best`` the lowest filtered level of an accepted probe, ``allowance`` the
    degradation D that is tolerated, ``standard_error`` the one that entered it.
    """

    start: float = math.nan
    best: float = math.inf
    allowance: float = math.inf
    standard_error: float = 0.0

    @property
    def bound(self) -> float:
        """``y_best + D``: no accepted probe lies above it."""
        return self.best + self.allowance

    @property
    def progress(self) -> float:
        """``y_0 - y_best``, what training has gained so far."""
        return self.start - self.best

    def give_back(self, value: float) -> float:
        """Fraction of the progress that a probe ``value`` gives back; 0 below the best, inf without progress."""
        excess = value - self.best
        if excess <= 0:
            return 0.0
        return excess / self.progress if self.progress > 0 else math.inf


class EnvelopeRule:
    """``D = max(phi (y_0 - y_best), c * standard error, f |y_best|)``: never give back more than phi of the gain.

    Parameters
    ----------
    give_back
        Fraction ``phi`` of the progress.
    standard_errors
        Number ``c`` of standard errors of the probe's paired differences.
    floor_frac
        Fraction ``f`` of the best probe's magnitude, for fine-tuning runs that start near their end.

    Notes
    -----
    Theorem (by induction over accepted probes): with ``y <= y_best + D`` required of each, and ``y_best`` never rising,
    every accepted probe of one objective lies within the largest D that was in force of the best level, independent
    of the number of steps; the innovation gate alone (Or 2026, theorem 7.3) only bounds it by ``y_0 + (t+1) eps``.
    Losses may be zero or negative: only differences enter, but for the floor. EXACT; about probes, not about the steps
    between them, nor about the population.

    References
    ----------
    Or, arXiv 2601.17483, theorem 7.3 and proposition 7.5.
    """

    def __init__(self, *, give_back: float, standard_errors: float, floor_frac: float) -> None:
        self._give_back, self._standard_errors, self._floor_frac = give_back, standard_errors, floor_frac

    def of(self, start: float, best: float, standard_error: float, *, share: float = 1.0) -> Envelope:
        """The envelope for the next probe, from what is known before it; ``share`` of phi for an inner line."""
        allowance = max(
            share * self._give_back * (start - best),
            self._standard_errors * standard_error,
            self._floor_frac * abs(best),
        )
        return Envelope(start, best, allowance, standard_error)
