"""What a check is: it says what it needs to see, and judges one step's samples."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from kalmanguard.forensics.report import Finding
from kalmanguard.forensics.samples import Sample


class Need(StrEnum):
    """What has to be taken from the sampled layers; nothing is taken that no check needs."""

    FEATURES = "features"
    ATTENTION = "attention"
    GRADIENTS = "gradients"
    WEIGHTS = "weights"
    UPDATES = "updates"
    INTEGRITY = "integrity"


class Check(Protocol):
    """One check. It keeps its own baselines, sees no tensor, and never learns from what it holds to be a fault.

    Attributes
    ----------
    name
        In findings and evidence.
    needs
        What it reads of a `LayerSample`.
    """

    name: str
    needs: frozenset[Need]

    def judge(self, sample: Sample) -> list[Finding]:
        """Judge what was sampled of one step; ``ok`` findings withdraw earlier ones of the same layer."""
        ...

    def forget(self) -> None:
        """The state was set on purpose: what compares one moment with another starts anew."""
        ...
