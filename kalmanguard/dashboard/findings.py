"""What attached sensors found, by layer and step: the rows of a heat map."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, Final

from kalmanguard.records import Evidence

#: In place of a layer's name: a finding about the model as a whole.
MODEL: Final = "(model)"
#: Findings that are kept, the latest ones; and rows of the map, those with the most findings.
KEPT, ROWS = 20_000, 24
_NAMED = re.compile(r"(?:damping of (?P<damped>\S+)$)")
_PREFIX = re.compile(r"(?P<layer>[\w.\-/()\[\]]{1,160}): ")
_OF = re.compile(r"^the [\w ]+ of (?P<layer>[\w.\-/()\[\]]{1,160}) is ")


def layer_of(finding: Evidence) -> str:
    """The layer that a finding speaks of.

    >>> from kalmanguard.records import Guarantee
    >>> def of(detector, message):
    ...     return layer_of(Evidence(detector, 1.0, True, Guarantee.HEURISTIC, message))
    >>> of("Forensics.saturation", "layers.2: 70 % of the values are at a bound")
    'layers.2'
    >>> of("SpectrumMonitor.spectrum", "the stable rank of fc1.weight is 1.2; 9 was to be expected")
    'fc1.weight'
    >>> of("CurvatureMonitor.curvature", "the curvature has doubled")
    '(model)'
    """
    if found := _NAMED.search(finding.detector):
        return found["damped"]
    found = _PREFIX.match(finding.message) or _OF.match(finding.message)
    return found["layer"] if found else MODEL


class FindingLog:
    """Findings in bounded memory."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, str, str]] = deque(maxlen=KEPT)
        self.count = 0

    def add(self, step: int, findings: Iterable[Evidence]) -> None:
        """Take in the findings of a step."""
        for finding in findings:
            self._kept.append((step, layer_of(finding)[:160], finding.detector[:160]))
            self.count += 1

    def map(self, low: int, high: int, columns: int) -> dict[str, Any]:
        """Number of findings per layer and stretch of steps.

        Returns
        -------
        dict
            ``start`` and ``width`` of the stretches in steps, and ``layers``: per layer its ``name``, the ``count`` of
            each stretch that has any, as pairs ``[stretch, count]``, and the ``checks`` with their numbers. At most
            24 layers, those with the most findings; ``left_out`` says how many others there are.
        """
        width = max(1, -(-(high - low + 1) // columns))
        cells: dict[str, Counter[int]] = {}
        checks: dict[str, Counter[str]] = {}
        for step, layer, check in self._kept:
            if low <= step <= high:
                cells.setdefault(layer, Counter())[(step - low) // width] += 1
                checks.setdefault(layer, Counter())[check] += 1
        order = sorted(cells, key=lambda layer: -cells[layer].total())
        return {
            "start": low,
            "width": width,
            "layers": [
                {"name": name, "cells": sorted(cells[name].items()), "checks": dict(checks[name].most_common(8))}
                for name in sorted(order[:ROWS])
            ],
            "left_out": max(0, len(order) - ROWS),
        }
