"""The only things that flow between the stages: frozen records, numbers only.

``sensors -> Measurement -> Engine -> Decision -> journal -> actuators``. Nothing here knows torch, a clock or a file.
Steps are counted by the supervisor from 1: step ``t`` is what happened between two calls of ``update()``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

#: In `Measurement.tampered`: one step moved the parameters by more than ten times their own norm.
OVERWRITE = "overwrite"


class Action(StrEnum):
    """What was done with a step."""

    ACCEPT = "ACCEPT"
    VETO = "VETO"
    ROLLBACK = "ROLLBACK"
    HALT = "HALT"


class Level(StrEnum):
    """How sure the supervisor is that the run is leaving its envelope."""

    WARMUP = "WARMUP"
    NOMINAL = "NOMINAL"
    SUSPECT = "SUSPECT"
    CONFIRMED = "CONFIRMED"


class Mode(StrEnum):
    """The controller's own state."""

    WATCHING = "WATCHING"
    RECOVERING = "RECOVERING"
    HALTED = "HALTED"


class Guarantee(StrEnum):
    """What stands behind a statistic: a theorem, a limit theorem, or experience."""

    EXACT = "EXACT"
    ASYMPTOTIC = "ASYMPTOTIC"
    HEURISTIC = "HEURISTIC"


@dataclass(frozen=True, slots=True, eq=False)
class ProbeReading:
    """Per-example held-out losses of one state, in nats or the user's own unit; shape ``(n,)``, float64."""

    losses: FloatArray

    @property
    def mean(self) -> float:
        """Exactly rounded mean (``math.fsum``), so that every build computes the same number; nan if any loss is."""
        values = self.losses.tolist()
        if not all(map(math.isfinite, values)):
            return math.nan
        try:
            return math.fsum(values) / len(values)
        except OverflowError:  # of finite losses near the largest float
            return math.fsum(value / len(values) for value in values)


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured during warm-up, once per run: seconds per step, probe and snapshot; ring slots that fit."""

    step_s: float
    probe_s: float
    snapshot_s: float
    slots: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the actuators did about the previous decision: the engine learns it with the next measurement."""

    action: Action
    restored_step: int | None = None
    rung: int = 0
    digest_expected: str | None = None
    digest_actual: str | None = None
    manual: bool = False
    error: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the restored state was shown to be the captured one, bit for bit."""
        return self.digest_expected is not None and self.digest_expected == self.digest_actual


@dataclass(frozen=True, slots=True)
class Evidence:
    """One detector's word on one step; ``guarantee`` says how much the numbers are worth."""

    detector: str
    statistic: float
    fired: bool
    guarantee: Guarantee
    message: str
    p_value: float | None = None
    e_value: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """Everything the engine is allowed to see of one step; what the journal keeps is exactly this.

    Attributes
    ----------
    step
        Number of the step, from 1. A measurement with an ``outcome`` that restored a state repeats its step.
    loss
        Training loss as the user passed it; ``None`` when not passed, nan or infinite when that is what it was.
    learning_rates
        The user's learning rate per param group, before any factor of ours.
    lr_factor
        The factor that our actuators applied on top in this step (1 when untouched).
    gradient_norm
        Euclidean norm of the whole gradient before the step; ``None`` when it could not be seen.
    velocity
        Sketched parameter update ``S (theta_t - theta_{t-1})``, shape ``(k,)``; ``None`` after a break.
    rounding_floor
        Norm below which a velocity is rounding noise of the parameters' own dtype.
    buffer_norm
        Norm of the floating-point buffers (BatchNorm statistics and the like); ``None`` without any.
    veto
        Why the proposed step was dropped before it was applied: ``"nonfinite"``, ``"explosion"``; ``"clipped"``
        when it was scaled down to the gate instead; ``None`` when it was applied as proposed.
    parameters_finite
        Whether the sketch (hence every parameter) is finite.
    tampered
        What changed between two optimizer steps without the optimizer: ``"parameters"``, ``"moments"``, with
        ``"silent "`` before it when no counter of torch shows a write; `OVERWRITE` when the parameters moved by more
        than ten times their norm.
    probe
        Held-out losses at this state, when a probe was taken.
    outcome
        What was done about the previous decision.
    costs
        Given once, when the timings of warm-up are complete.
    objective
        Number of times that the user declared a new objective.
    snapshot_failed
        The snapshot that was ordered before could not be taken.
    braced
        The state from before this step was captured right before the step was applied, because its gradient or its
        learning rate was larger than any so far.
    findings
        What the attached sensors found in this step.
    """

    step: int
    loss: float | None = None
    learning_rates: tuple[float, ...] = ()
    lr_factor: float = 1.0
    gradient_norm: float | None = None
    velocity: FloatArray | None = None
    rounding_floor: float = 0.0
    buffer_norm: float | None = None
    veto: str | None = None
    parameters_finite: bool = True
    tampered: tuple[str, ...] = ()
    probe: ProbeReading | None = None
    outcome: Outcome | None = None
    costs: Costs | None = None
    objective: int = 0
    snapshot_failed: bool = False
    braced: bool = False
    findings: tuple[Evidence, ...] = ()


class Innovation(NamedTuple):
    """Measured minus predicted, with the scale it is judged by."""

    channel: str
    value: float
    scale: float

    @property
    def normalised(self) -> float:
        """The innovation in units of its predicted standard deviation."""
        return self.value / self.scale


@dataclass(frozen=True, slots=True)
class Orders:
    """What the engine asks of the actuators; carried by the `Decision`, executed in protect mode.

    Attributes
    ----------
    adopt
        The state that was captured right before this step enters the ring, as the step before.
    snapshot
        Capture the present state into the ring as ``step``.
    certified
        The present probe lies inside the envelope, so the captured state counts as certified.
    certify
        Steps already in the ring that this decision certifies.
    evict
        Steps in the ring whose slots are given up, before the capture.
    restore
        Step to restore, for ROLLBACK and HALT.
    rung
        Rung of the recovery ladder (0 is the mildest), for ROLLBACK.
    gate
        Largest gradient norm that the next step may be applied with; ``inf`` for none.
    clip
        Whether a gradient above the gate is scaled down to it instead of dropped.
    release
        The ladder was climbed down again: actuators lift what is still in force.
    lasting
        With ``release``: the cut of the learning rate stays.
    """

    snapshot: bool = False
    certified: bool = False
    certify: tuple[int, ...] = ()
    evict: tuple[int, ...] = ()
    restore: int | None = None
    rung: int = 0
    gate: float = math.inf
    clip: bool = False
    release: bool = False
    adopt: bool = False
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What the supervisor decided about a step, with the evidence and one plain sentence.

    ``action`` is what was done and ``proposed`` what the engine asked for: they differ in observe mode. ``statistics``
    are the engine's own numbers, named by `kalmanguard.engine.STATISTICS`.
    """

    step: int
    action: Action
    proposed: Action
    level: Level
    mode: Mode
    reason: str
    evidence: tuple[Evidence, ...] = ()
    restored_step: int | None = None
    certificate: str = "HOLDS"
    orders: Orders = field(default=Orders(), repr=False)
    statistics: tuple[float, ...] = field(default=(), repr=False)

    @property
    def rolled_back(self) -> bool:
        """Whether an earlier state was restored in this step."""
        return self.restored_step is not None
