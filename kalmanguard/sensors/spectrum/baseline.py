"""What a layer's spectrum is like, learned from its own first measurements, and when it has collapsed against that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kalmanguard.estimators.noise import CLIP, Scale, track
from kalmanguard.records import Evidence, Guarantee
from kalmanguard.sensors.spectrum.report import LayerSpectrum

#: Measurements of a layer before it is judged. The first of all is left out: training leaves initial weights fast.
LEARNED_FROM = 5
_GAIN = 0.1
_MEMORY = 20
_DEVIATIONS = 8.0
_WORST_CONDITION = 1e8


@dataclass(frozen=True, slots=True)
class _Rule:
    """How far the logarithm of a measure may fall: at once below its moving level, and in all below the learned one."""

    name: str
    value: Callable[[LayerSpectrum], float]
    at_once: float
    in_all: float


def _inverse_condition(spectrum: LayerSpectrum) -> float:
    return 1.0 / min(spectrum.condition_number, _WORST_CONDITION)


_RULES = (
    _Rule("stable rank", lambda s: s.stable_rank, math.log(2.0), math.log(8.0)),
    _Rule("Fiedler value", lambda s: s.fiedler_value, math.log(1.5), math.log(3.0)),
    # The smallest singular value of a nearly square matrix is a matter of chance, so only orders of magnitude count.
    _Rule("inverse condition number", _inverse_condition, math.log(100.0), math.inf),
)


class _Track(NamedTuple):
    level: float = 0.0
    learned: float = 0.0
    scale: Scale = Scale()


class Baseline:
    """Moving level and spread of one layer's log measures, with the level that was first learned.

    A measure has collapsed when its logarithm lies below the moving level by 8 tracked deviations *and* by a factor (2
    for the stable rank, 1.5 for the Fiedler value, 100 for the condition number, upwards), or below the level learned
    from measurements 2 to 6 by a larger factor (8, 3, none). The level follows clipped deviations at a tenth of each,
    so a slow healthy fall moves it and a collapse hardly does.

    Parameters
    ----------
    name
        Of the layer, for messages.

    Notes
    -----
    Guarantee: HEURISTIC. The factors come from healthy runs of the reference plants, which do not fire
    (``tests/test_spectrum.py``). A stable rank that is below 2 when it is learned cannot fall by a factor of 2. A layer
    must have been measured six times before it is judged.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen = 0
        self._tracks = {rule.name: _Track() for rule in _RULES}

    def compare(self, spectrum: LayerSpectrum) -> tuple[Evidence, ...]:
        """Judge one measurement, then learn from it; returns evidence of what has collapsed only."""
        self._seen += 1
        if self._seen == 1:
            return ()
        number = self._seen - 1
        found = []
        for rule in _RULES:
            value = rule.value(spectrum)
            if not value > 0:  # nan without two rows that vary; a graph that falls apart has exactly 0
                if not (value == 0 and rule.name == "Fiedler value"):
                    continue
                value = 1e-12
            known = self._tracks[rule.name]
            log = math.log(value)
            if number <= LEARNED_FROM:
                level = known.level + (log - known.level) / number
                scale = track(known.scale, log - known.level, _MEMORY) if number > 1 else known.scale
                self._tracks[rule.name] = _Track(level, level, scale)
                continue
            deviation = log - known.level
            sigma = known.scale.deviation
            at_once = deviation < -max(rule.at_once, _DEVIATIONS * sigma)
            in_all = log - known.learned < -rule.in_all
            if at_once or in_all:
                found.append(self._evidence(rule, spectrum, known, deviation))
            # A floor of one percent, so that a layer that has stood still can be followed when it moves again.
            bound = CLIP * max(sigma, 0.01)
            clipped = max(-bound, min(bound, deviation))
            level = known.level + _GAIN * clipped
            self._tracks[rule.name] = _Track(level, known.learned, track(known.scale, deviation, _MEMORY))
        return tuple(found)

    def _evidence(self, rule: _Rule, spectrum: LayerSpectrum, known: _Track, deviation: float) -> Evidence:
        message = (
            f"the {rule.name} of {self._name} is {rule.value(spectrum):.3g}; {math.exp(known.level):.3g} was to be "
            f"expected, {math.exp(known.learned):.3g} was learned"
        )
        return Evidence("spectrum", deviation, True, Guarantee.HEURISTIC, message)
