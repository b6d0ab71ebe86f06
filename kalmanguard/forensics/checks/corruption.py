"""Silent corruption: state that changes between optimizer steps, and single weights that jump alone."""

from __future__ import annotations

import math

from kalmanguard.forensics.checks.check import Need
from kalmanguard.forensics.report import MODEL, Finding, Severity
from kalmanguard.forensics.samples import Sample
from kalmanguard.records import Guarantee

_JUMP = 16.0
_ALONE = 8.0
#: Steps at the start in which a loop shows whether it writes to its parameters itself, and how often it then does.
_LEARNING, _HABIT = 32, 3


class Corruption:
    """Between two steps: version counters and bits of slices (`IntegritySensor`). Over time: the largest of a block.

    What changed without a write that torch counts (faulty memory, or code that writes through ``.data``) is critical;
    what was written between two optimizer steps is a warning, unless the loop does so itself (three times in the first
    32 steps: averaging, clipping of weights). And a block of at most 65,536 weights whose largest magnitude has grown
    16 times since the block was last looked at, while its second largest lies 8 times below, holds a flipped exponent
    bit rather than a learned weight: critical.

    Notes
    -----
    Guarantee: EXACT that a change which is reported as silent happened; HEURISTIC for the rest. A flip that makes a
    weight smaller, or up to 16 times larger, is seen only by the comparison of slices, once in
    `IntegritySensor.cycle_steps`. Latency: one step for what raises a version counter; for a large flip one sample of
    the layer for each of its blocks. Cost: some 10 us a step and 0.05 us a parameter (integrity), and one pass over a
    block.
    """

    name = "corruption"
    needs = frozenset({Need.INTEGRITY, Need.WEIGHTS})

    def __init__(self) -> None:
        self._largest: dict[tuple[str, int], float] = {}
        self._steps = 0
        self._written = 0

    def judge(self, sample: Sample) -> list[Finding]:
        found = [f for what in sample.tampered if (f := self._tampered(what)) is not None]
        self._steps += 1
        for seen in sample.layers:
            if seen.block is not None:
                finding = self._block(seen.name, *seen.block)
                if finding is not None:
                    found.append(finding)
        return found

    def forget(self) -> None:
        self._largest.clear()

    def _tampered(self, what: str) -> Finding | None:
        if what.startswith("silent"):
            message = f"{what.removeprefix('silent ')} changed between two steps, without a write that torch counts"
            return Finding(self.name, MODEL, Severity.CRITICAL, 1.0, message, Guarantee.EXACT)
        if what == "parameters":
            self._written += self._steps < _LEARNING
            if self._written >= _HABIT:
                return None
        message = f"{what} were written between two optimizer steps"
        return Finding(self.name, MODEL, Severity.WARNING, 1.0, message)

    def _block(self, name: str, index: int, largest: float, second: float) -> Finding | None:
        key = (name, index)
        before = self._largest.get(key)
        if not math.isfinite(largest):
            return Finding(self.name, name, Severity.CRITICAL, largest, "a weight is not finite", Guarantee.EXACT)
        if before is not None and largest > _JUMP * before > 0.0 and largest > _ALONE * second:
            message = f"one weight is {largest:.3g}, where the largest was {before:.3g} and the next is {second:.3g}"
            return Finding(self.name, name, Severity.CRITICAL, largest / before, message)
        self._largest[key] = largest
        return None
