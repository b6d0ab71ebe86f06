"""What the checks are given of one step: small NumPy arrays and plain numbers, taken from the sampled layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Inputs of a layer in one forward pass: ``rows`` (at most 64 examples or positions, at most 512 units)."""

    rows: Array
    largest_number: float


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """Scaled attention logits ``(examples, heads, queries, keys)``, masked ones being ``-inf``."""

    logits: Array


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """Sampled elements of one parameter around one optimizer step, in float64.

    Attributes
    ----------
    optimizer
        Name of the optimizer's class where it is torch's own, else an empty string.
    group
        The hyperparameters that the step was taken with.
    count_before, count
        The optimizer's own step counter; 0 before the first, -1 where it has none.
    before, after
        The parameter.
    gradient
        As the optimizer used it.
    state_before, state
        Sampled elements of the optimizer's state, by name; empty before the first step.
    precision, state_precision
        Spacing of the dtype at 1 (``finfo.eps``) of the parameter and of the state.
    """

    optimizer: str
    group: Mapping[str, Any]
    count_before: int
    count: int
    before: Array
    after: Array
    gradient: Array | None
    state_before: Mapping[str, Array]
    state: Mapping[str, Array]
    precision: float
    state_precision: float


@dataclass(frozen=True, slots=True, eq=False)
class LayerSample:
    """What was seen of one layer in one step; ``None`` is what was not.

    Attributes
    ----------
    gradient_rms
        Root mean square of sampled gradient elements, 0 where there is no gradient; ``None`` where none is expected.
    weight_rms
        Root mean square of the same sampled elements of the largest weight, each time.
    block
        Index of a block of that weight, and the two largest magnitudes in it.
    judged
        False where the layer serves only as a reference for others in this step.
    """

    name: str
    features: Features | None = None
    attention: Attention | None = None
    gradient_rms: float | None = None
    weight_rms: float | None = None
    block: tuple[int, float, float] | None = None
    update: Update | None = None
    judged: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One step: the loss, what tampered with the state before it, and the sampled layers (none when not due)."""

    step: int
    loss: float | None = None
    tampered: tuple[str, ...] = ()
    layers: tuple[LayerSample, ...] = field(default=())
