"""What a run is like: a table of estimates with their intervals, each with what it means and what stands behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kalmanguard.analysis.judgement import Judgement
from kalmanguard.records import Guarantee


class Estimate(NamedTuple):
    """One line: the value with its bounds, the same in words, what it means, and its guarantee."""

    name: str
    value: float
    low: float
    high: float
    text: str
    meaning: str
    guarantee: Guarantee


def estimates(judgement: Judgement) -> Iterator[Estimate]:
    """Estimate what there is data for."""
    del judgement
    yield from ()
