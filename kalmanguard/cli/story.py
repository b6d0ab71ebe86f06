"""What the demonstration tells: three runs of one plant, what happened to them, and what was done about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kalmanguard.records import Action, Decision

#: The runs, in the order in which they are advanced and shown.
CLEAN, FAULTED, SUPERVISED = LANES = ("clean", "faulted", "supervised")
#: Innovations that are shown: those of every step, and where the probe's loss stands in its envelope.
CHANNELS = ("loss", "gradient", "gain", "buffers", "trajectory", "held-out loss")

Point = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """A fault as it is drawn: from its first step to its last (the run's last, when it lasts for good)."""

    label: str
    first: int
    last: int


@dataclass(frozen=True)
class Event:
    """A step that was suspicious, dropped or undone."""

    step: int
    action: str
    level: str
    reason: str
    restored_step: int | None

    @classmethod
    def of(cls, decision: Decision) -> Event:
        """Take what matters from a decision."""
        return cls(decision.step, decision.action.value, decision.level.value, decision.reason, decision.restored_step)

    @property
    def lost(self) -> int:
        """Steps of training that it cost."""
        if self.restored_step is not None:
            return self.step - self.restored_step
        return int(self.action == Action.VETO)


@dataclass(frozen=True)
class Outcome:
    """How one run ended.

    ``steps_undone`` were dropped or rolled back; ``steps_behind`` is for how many steps the clean run had already
    been where this one ended (all of them when its loss is not finite).
    """

    name: str
    steps: int
    held_out_loss: float
    ratio: float
    vetoes: int
    rollbacks: int
    steps_undone: int
    steps_behind: int
    seconds: float
    stopped: str | None


@dataclass
class Story:
    """Everything that is shown at the end, and what the figure is drawn from."""

    plant: str
    description: str
    steps: int
    seed: int
    faults: list[str]
    spans: list[Span]
    bound: float
    curves: dict[str, list[Point]] = field(default_factory=dict)
    #: Per channel, step and innovation in units of its bound; nan where a loss was not finite.
    innovations: dict[str, list[Point]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def note(self, decision: Decision, names: Sequence[str]) -> Event | None:
        """Take in a decision of the supervised run; returns it as an event when it is one."""
        values = dict(zip(names, decision.statistics, strict=False))
        self._note_innovations(decision.step, values)
        if decision.rolled_back and math.isfinite(y := values.get("y", math.nan)):
            # The loss that was found, before the one that was restored.
            self.curves.setdefault(SUPERVISED, []).append((decision.step, y))
        if decision.level.value not in ("SUSPECT", "CONFIRMED"):
            return None
        event = Event.of(decision)
        self.events.append(event)
        return event

    def _note_innovations(self, step: int, values: dict[str, float]) -> None:
        seen = {channel: values.get(f"z_{channel}", math.nan) / self.bound for channel in CHANNELS[:-1]}
        y, best, bound = (values.get(name, math.nan) for name in ("y", "y_best", "bound"))
        seen["held-out loss"] = (y - best) / (bound - best) if bound > best else math.nan
        for channel, share in seen.items():
            if math.isfinite(share) or channel == "loss":
                self.innovations.setdefault(channel, []).append((step, share))

    @property
    def interventions(self) -> list[Event]:
        """Events in which something was done."""
        return [event for event in self.events if event.action != Action.ACCEPT]

    def steps_behind(self, excess: float) -> int:
        """For how many steps the clean run had already been as good as a run that ends ``excess`` above it.

        The clean curve wavers, so it is read off the middle between the lowest loss before and the highest one after.
        """
        if not math.isfinite(excess):
            return self.steps
        steps, losses = np.array([point for point in self.curves[CLEAN] if math.isfinite(point[1])]).T
        falling = (np.minimum.accumulate(losses) + np.maximum.accumulate(losses[::-1])[::-1]) / 2
        levels = falling[-1] + np.array([0.0, max(excess, 0.0)])
        here, there = np.interp(levels, falling[::-1], steps[::-1])
        return round(float(here - there))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)


_WORDS = {
    "lr_spike": "learning rate",
    "lr_creep": "learning rate",
    "gradient_scale": "gradient",
    "weight_scale": "weights",
}


def fault_label(kind: str, numbers: dict[str, Any]) -> str:
    """What a fault is called in a figure.

    >>> fault_label("lr_spike", {"factor": 50.0, "steps": 5}), fault_label("label_noise", {"fraction": 0.3})
    ('learning rate ×50', 'label noise 30 %')
    """
    words = _WORDS.get(kind, kind.replace("_", " "))
    if "factor" in numbers:
        return f"{words} ×{numbers['factor']:g}"
    if "rate" in numbers:
        return f"{words} ×{numbers['rate']:g} a step"
    if "fraction" in numbers:
        return f"{words} {100 * numbers['fraction']:g} %"
    return words
