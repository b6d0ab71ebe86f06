"""Onset: since when have innovations been off? The maximum-likelihood change point of a window, at a detection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

#: Smallest mean, in deviations, that counts as a shift: healthy innovations are biased by less.
_SHIFT = 1.5
#: Largest innovation that counts, in deviations, and the least share of rows that are up.
_LARGEST, _UP_FRAC = 10.0, 0.6


class Onset(NamedTuple):
    """Rows before the end at which the change lies (1 is the last row), its likelihood ratio, and which column."""

    ago: int
    statistic: float
    channel: int


def onset(window: Sequence[Sequence[float]], *, threshold: float = 64.0) -> Onset | None:
    """Find since when the mean of any channel has been up, given that something was detected at the window's end.

    Parameters
    ----------
    window
        Rows of normalised innovations, oldest first, one column per channel; nan where a channel saw nothing.
    threshold
        Least likelihood ratio of the rows before the last one, in squared deviations: what one innovation of eight
        deviations has. Healthy innovations have heavy tails, and come in pairs.

    Returns
    -------
    Onset or None
        ``None`` when nothing was off before the last row, which was detected and needs no further explanation.

    Notes
    -----
    For each channel the change point ``tau`` maximises ``(sum_{i >= tau} z_i)^2 / (n - tau)`` over the rows before the
    last, the likelihood ratio of a mean that is 0 before and constant after. Most rows of the stretch must be up by 1.5
    deviations themselves, and none counts as more than 10: a single spike that has healed is no shift. The earliest
    onset of the channels beyond the threshold counts. Only rises are looked for. Guarantee: HEURISTIC (innovations of
    deviation 1, one change). Cost: one pass over the window, at a detection only.

    References
    ----------
    Hinkley, Biometrika 57 (1970).

    Examples
    --------
    >>> quiet, shifted = [(0.3,), (-0.4,), (0.1,), (-0.2,)], [(4.9,), (5.4,), (3.8,), (5.2,), (9.6,)]
    >>> onset(quiet + shifted).ago
    5
    >>> onset(quiet + [(40.0,)]) is None
    True
    """
    best: Onset | None = None
    for channel in range(len(window[0]) if window else 0):
        total = score = 0.0
        rows = up = at = 0
        for ago, row in enumerate(reversed(window[:-1]), start=2):
            z = row[channel]
            if math.isnan(z):
                continue
            rows += 1
            up += z > _SHIFT
            total += max(-_LARGEST, min(_LARGEST, z))
            ratio = total * total / rows
            if up >= _UP_FRAC * rows and ratio > score:
                score, at = ratio, ago
        if score > threshold and (best is None or at > best.ago):
            best = Onset(at, score, channel)
    return best
