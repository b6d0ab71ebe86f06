"""Attribution of a spike of the training loss: is it the data, the model, or the computation that does not repeat?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from kalmanguard.records import Guarantee

#: Deviations above the usual level from which a loss counts as a spike.
_SPIKE = 4.0
#: Share of the reported height that a spike has at least, that no spike has at most, and that is none in any case.
_SPIKE_FRAC, _QUIET_FRAC, _NOTHING_FRAC = 0.25, 0.5, 0.05
#: How far below the usual level a loss is not the training loss: deviations, and share of the level.
_FOREIGN, _FOREIGN_FRAC = 8.0, 0.75
#: Smallest deviation, relative to the level.
_FLOOR_FRAC = 1e-3


class Cause(StrEnum):
    """What a spike of the training loss is put down to."""

    HARD_DATA = "HARD_DATA"
    MODEL = "MODEL"
    HARDWARE = "HARDWARE"
    ABSTAIN = "ABSTAIN"


class Usual(NamedTuple):
    """Level of the training loss at a state, and the standard deviation of single batches around it."""

    level: float
    deviation: float


@dataclass(frozen=True, slots=True)
class AttributionResult:
    """What a spike is put down to, with the numbers.

    Attributes
    ----------
    cause
        The verdict.
    message
        One sentence.
    reported
        The loss that training reported.
    again
        Loss of the same batch, evaluated again on the present state.
    repeated
        The same once more; only where `again` was ordinary.
    certified
        Loss of the same batch on the certified state.
    step, certified_step
        Step of the spike, and of the certified state.
    guarantee
        HEURISTIC, always.
    """

    cause: Cause
    message: str
    reported: float | None = None
    again: float | None = None
    repeated: float | None = None
    certified: float | None = None
    step: int | None = None
    certified_step: int | None = None
    guarantee: Guarantee = Guarantee.HEURISTIC


class Certified(NamedTuple):
    """How the batch is evaluated on a certified state, what the loss was like there, and of which step it is."""

    evaluate: Callable[[], float]
    usual: Usual
    step: int | None = None


def attribute(
    reported: float | None,
    usual: Usual | None,
    *,
    evaluate: Callable[[], float],
    certified: Certified | None,
    tolerance: float = 1e-3,
) -> AttributionResult:
    """Evaluate the batch of a spike again, on the present state and on a certified one, and say what explains it.

    ===============  =============  =========
    certified state  present state  verdict
    ===============  =============  =========
    spikes           either         HARD_DATA
    quiet            spikes         MODEL
    quiet            quiet          HARDWARE
    ===============  =============  =========

    A state spikes on the batch when the loss lies more than four deviations above what was usual *there* and makes up a
    quarter of the reported height at least; it is quiet within four deviations and half of the height. What is in
    between, is not decided.

    Parameters
    ----------
    reported
        The training loss that spiked; it may be nan or infinite.
    usual
        Level and deviation of the training loss before the spike.
    evaluate
        Gives the loss of the same batch on the present state: the one that the loss was reported on where it can be
        had, else the one after that step.
    certified
        The same on a state that was certified before the spike, with what was usual then.
    tolerance
        Relative difference up to which two evaluations of one state are the same: what nondeterministic kernels may do.

    Returns
    -------
    AttributionResult
        ABSTAIN, with the reason, where something is missing, an evaluation fails, the loss is no spike, or the numbers
        do not decide.

    Notes
    -----
    Guarantee: HEURISTIC. Assumes that the loss evaluated here is the training loss; one that lies far below the usual
    level is not, and is not judged. HARDWARE means no more than that the number does not come out again: a fault of the
    computation, a race, or something that this evaluation does not repeat, such as a rare draw of dropout or a change
    of the batch after it was used. A model that is broken *and* met by a hard batch reads HARD_DATA. Where the present
    state is the one after the step, a fault that has spoiled the step reads MODEL.
    Cost: two evaluations, a third one before HARDWARE is said.

    Examples
    --------
    >>> usual = Usual(level=1.0, deviation=0.1)
    >>> quiet = Certified(lambda: 1.3, Usual(1.2, 0.1), step=100)
    >>> attribute(5.0, usual, evaluate=lambda: 4.8, certified=quiet).cause
    <Cause.MODEL: 'MODEL'>
    >>> attribute(5.0, usual, evaluate=lambda: 1.0, certified=quiet).cause
    <Cause.HARDWARE: 'HARDWARE'>
    >>> attribute(5.0, usual, evaluate=lambda: 4.8, certified=None).message
    'There is no certified state to compare with.'
    """
    base = AttributionResult(Cause.ABSTAIN, "", reported, certified_step=None if certified is None else certified.step)
    if reported is None:
        return replace(base, message="No training loss was reported for this step.")
    if usual is None or not math.isfinite(usual.level):
        return replace(base, message="The usual level of the training loss is not known yet.")
    height = reported - usual.level if math.isfinite(reported) else math.inf
    if height <= _SPIKE * _deviation(usual):
        return replace(
            base, message=f"The loss of {reported:.4g} is no spike: {usual.level:.4g} is usual before this step."
        )
    if certified is None:
        return replace(base, message="There is no certified state to compare with.")
    try:
        before, again = certified.evaluate(), evaluate()
    except Exception as fault:
        return replace(base, message=f"The batch could not be evaluated again: {type(fault).__name__}: {fault}")
    base = replace(base, again=again, certified=before)
    spiked, spikes = _spikes(before, certified.usual, height), _spikes(again, usual, height)
    where = "" if certified.step is None else f" of step {certified.step}"
    words = f"The loss of {reported:.4g} was {again:.4g} when evaluated again and {before:.4g} on the certified state"
    if spiked:
        return replace(base, cause=Cause.HARD_DATA, message=f"{words}{where}, which spikes too: the data are hard.")
    if spiked is None or spikes is None:
        return replace(base, message=f"{words}{where}; that does not decide it.")
    if spikes:
        return replace(base, cause=Cause.MODEL, message=f"{words}{where}, which does not spike: the model is at fault.")
    if min(_above(again, usual), _above(before, certified.usual)) < 0.0:
        return replace(base, message=f"{words}{where}: far below the usual loss, so it is not the loss of training.")
    try:
        repeated = evaluate()
    except Exception as fault:
        return replace(base, message=f"The batch could not be evaluated again: {type(fault).__name__}: {fault}")
    why = (
        "it did not come out again"
        if abs(repeated - again) <= tolerance * max(abs(repeated), abs(again))
        else f"even one state gave two results, the other {repeated:.4g}"
    )
    return replace(
        base, cause=Cause.HARDWARE, repeated=repeated, message=f"{words}{where}: {why}, so the computation is at fault."
    )


def _deviation(usual: Usual) -> float:
    return max(usual.deviation if math.isfinite(usual.deviation) else 0.0, _FLOOR_FRAC * abs(usual.level), 1e-12)


def _spikes(value: float, usual: Usual, height: float) -> bool | None:
    """Whether a loss stands out like the reported one; ``None`` where that is not clear."""
    if not math.isfinite(value):
        return True
    excess, noise = value - usual.level, _SPIKE * _deviation(usual)
    if math.isinf(height):
        # What was not finite: only its like repeats it, and only what is ordinary does not.
        return False if excess <= noise else None
    if excess > noise and excess >= _SPIKE_FRAC * height:
        return True
    quiet = (excess <= noise and excess <= _QUIET_FRAC * height) or excess <= _NOTHING_FRAC * height
    return False if quiet else None


def _above(value: float, usual: Usual) -> float:
    """How far a loss lies above the least that may pass for the training loss."""
    return value - (usual.level - max(_FOREIGN * _deviation(usual), _FOREIGN_FRAC * abs(usual.level)))
