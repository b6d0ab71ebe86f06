"""What a failed assertion says: the step, the evidence, and what to look at."""

from __future__ import annotations

from kalmanguard.records import Decision

#: What to look at, by the detector that fired first.
_LOOK_AT = {
    "gradient-gate": "the batch of this step, the learning rate, and clipping of gradients",
    "loss-finite": "logarithms, divisions and square roots in the loss, and the range of half precision",
    "parameters-finite": "the update of this step: learning rate, loss scale, and the optimizer's epsilon",
    "integrity": "code that writes to parameters or optimizer states between two steps",
    "envelope": "the learning rate and its schedule around this step, and the data just before it",
    "probe-innovation": "the learning rate and its schedule around this step, and the data just before it",
    "gradient": "the batch of this step, the learning rate, and clipping of gradients",
    "gain": "the learning rate and the optimizer's state: a step moved the parameters more than its gradient explains",
    "learning-rate": "the schedule: the learning rate jumped",
    "buffers": "running statistics (BatchNorm): inputs out of their usual range",
}
_ANYTHING = "the learning rate, the data around this step, and the model's normalisation"


class InstabilityError(AssertionError):
    """A training is not stable; the message says at which step, on which evidence, and what to look at.

    Attributes
    ----------
    seed
        Of the run.
    step
        At which it showed; ``None`` if it concerns the whole run.
    """

    def __init__(self, seed: int, step: int | None, text: str, look_at: str) -> None:
        where = f"Seed {seed}" if step is None else f"Seed {seed}, step {step:,}"
        super().__init__(f"{where}: {text} Look at {look_at}.")
        self.seed, self.step = seed, step


def of_decision(seed: int, decision: Decision) -> InstabilityError:
    """The failure that a decision tells."""
    fired = [evidence for evidence in decision.evidence if evidence.fired]
    told = "; ".join(f"{e.detector} {e.statistic:.4g} ({e.guarantee.value}): {e.message}" for e in fired)
    look_at = next((_LOOK_AT[e.detector] for e in fired if e.detector in _LOOK_AT), _ANYTHING)
    evidence = f" Evidence: {told.rstrip('.')}." if told else ""
    return InstabilityError(seed, decision.step, f"{decision.reason}{evidence}", look_at)
