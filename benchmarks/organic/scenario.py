"""One scenario: what is trained, for how long, and whether it ends badly by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.organic.plant import OrganicPlant


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to train.

    Attributes
    ----------
    make
        Called with ``seed`` and ``steps``.
    steps
        Length of a run.
    harmful
        Whether a run that nobody guards is expected to end badly; the benchmark measures whether it does.
    """

    make: Callable[..., OrganicPlant]
    steps: int
    harmful: bool
